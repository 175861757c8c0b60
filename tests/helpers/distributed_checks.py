"""Checks of DTensors and of models that are spread over processes, each run by two processes at the same time.

`python distributed_checks.py STORE RANK` runs every check, and prints a JSON object: the error's text for each check,
which is "" if the check passed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import expo

ALPHA = 0.3
PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}
SHAPES = ((5, 3), (1, 4), (6, 8))  # five rows are 3 + 2, and the second process has no part of a single row


def tensor(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return random numbers, which are the same in each process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if two tensors have the same dtype, shape and bits."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    bits = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return same_kind and torch.equal(*bits)


def refusal(call: Callable[[], Any], kind: type[Exception] = expo.UsageError) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("the call was not refused")


def check_that_single_tensors_have_the_bits_of_whole_ones(mesh: DeviceMesh) -> None:
    for placements in PLACEMENTS.values():
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                sft, aligned = tensor(shape, 1), tensor(shape, 2, dtype)
                s, a = (distribute_tensor(each, mesh, placements) for each in (sft, aligned))
                for alpha in (ALPHA, 0.0):
                    expected = expo.extrapolate(sft, aligned, alpha)
                    found = expo.extrapolate(s, torch.nn.Parameter(a), alpha)
                    assert type(found) is DTensor
                    assert not found.requires_grad
                    assert (found.device_mesh, found.placements) == (a.device_mesh, a.placements)
                    assert (found.shape, found.stride(), found.dtype) == (a.shape, a.stride(), a.dtype)
                    assert found.to_local().shape == a.to_local().shape
                    assert equal(found.full_tensor(), expected)


def check_that_out_is_written_in_place(mesh: DeviceMesh) -> None:
    for placements in PLACEMENTS.values():
        sft, aligned = tensor((5, 3), 1), tensor((5, 3), 2)
        s, a = (distribute_tensor(each.clone(), mesh, placements) for each in (sft, aligned))
        for out in (distribute_tensor(torch.zeros_like(aligned), mesh, placements), a):
            local, versions = out.to_local(), (out._version, out._local_tensor._version)
            assert expo.extrapolate(s, a, ALPHA, out=out) is out
            assert equal(out.full_tensor(), expo.extrapolate(sft, aligned, ALPHA))
            assert local.data_ptr() == out.to_local().data_ptr()
            assert out._version > versions[0]
            assert out._local_tensor._version > versions[1]


def check_lists(mesh: DeviceMesh) -> None:
    """A list may have DTensors of several placements, tensors and arrays; tied weights may be listed twice."""
    pairs = [(tensor((5, 3), seed), tensor((5, 3), seed + 9)) for seed in range(3)]
    expected = [expo.extrapolate(s, a, ALPHA) for s, a in pairs]
    spread = [
        [distribute_tensor(each.clone(), mesh, placements) for each in pair]
        for pair, placements in zip(pairs, PLACEMENTS.values(), strict=True)
    ]
    sft, aligned = ([each[side] for each in (*spread, pairs[0])] for side in (0, 1))
    found = expo.extrapolate(iter(sft), iter(aligned), ALPHA)
    assert [type(each) for each in found] == [DTensor] * 3 + [torch.Tensor]
    assert all(equal(f.full_tensor(), e) for f, e in zip(found, expected, strict=False))
    assert equal(found[3], expected[0])
    versions = [each._version for each in aligned]
    outs = expo.extrapolate([*sft, sft[0]], [*aligned, aligned[0]], ALPHA, out=[*aligned, aligned[0]])
    assert all(out is a for out, a in zip(outs, [*aligned, aligned[0]], strict=True))
    assert all(equal(f.full_tensor(), e) for f, e in zip(outs, expected, strict=False))
    assert all(each._version > version for each, version in zip(aligned, versions, strict=True))
    other = torch.zeros_like(aligned[0])
    message = refusal(lambda: expo.extrapolate([sft[0], other], [aligned[0]] * 2, ALPHA, out=[other, other]))
    assert message.startswith("out[0] and out[1] are the same memory"), message
    message = refusal(lambda: expo.extrapolate(sft[:2], [aligned[0]] * 2, ALPHA))
    assert "but sft[1] is a DTensor" in message, message


def check_strided_parts(mesh: DeviceMesh) -> None:
    """A DTensor may be a view whose elements do not follow one another in memory."""
    sft, aligned = tensor((3, 6), 1).t(), tensor((3, 6), 2).t()
    s, a = (distribute_tensor(each.t().contiguous(), mesh, [Shard(1)]).t() for each in (sft, aligned))
    assert not a.to_local().is_contiguous()
    found = expo.extrapolate(s, a, ALPHA)
    assert (found.placements, found.stride()) == ((Shard(0),), expo.extrapolate(sft, aligned, ALPHA).stride())
    assert equal(found.full_tensor(), expo.extrapolate(sft, aligned, ALPHA))


def check_that_the_advice_of_each_refusal_works(mesh: DeviceMesh) -> None:
    sft, aligned = tensor((5, 3), 1), tensor((5, 3), 2)
    expected = expo.extrapolate(sft, aligned, ALPHA)
    a = distribute_tensor(aligned, mesh, [Shard(0)])
    other_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    cases = {
        "sft is a Tensor, which is no DTensor: each": sft,
        "sft is a DTensor of placements (Shard(dim=1),)": distribute_tensor(sft, mesh, [Shard(1)]),
        "with dimensions ('other',)": distribute_tensor(sft, other_mesh, [Shard(0)]),
    }
    for words, s in cases.items():
        message = refusal(lambda s=s: expo.extrapolate(s, a, ALPHA))
        assert message.startswith("aligned is a DTensor of placements (Shard(dim=0),) on the cpu mesh [0, 1]"), message
        assert words in message, message
        followed = eval(
            message.partition("alike: pass ")[2].removeprefix("torch's "),
            {"distribute_tensor": distribute_tensor, "sft": s, "aligned": a},
        )
        assert equal(expo.extrapolate(followed, a, ALPHA).full_tensor(), expected)
    partial = DTensor.from_local(sft / 2, mesh, [Partial()])
    message = refusal(lambda: expo.extrapolate(partial, a, ALPHA))
    assert message.startswith("sft is a DTensor of placements (Partial(sum),) on the cpu mesh"), message
    replicated = eval(message.partition(": pass ")[2], {"sft": partial, "torch": torch})
    message = refusal(lambda: expo.extrapolate(replicated, a, ALPHA))
    assert "sft is a DTensor of placements (Replicate(),)" in message
    s = replicated.redistribute(placements=a.placements)
    assert equal(expo.extrapolate(s, a, ALPHA).full_tensor(), expected)
    for out in (torch.empty_like(aligned), distribute_tensor(aligned, mesh, [Shard(1)])):
        message = refusal(lambda out=out: expo.extrapolate(s, a, ALPHA, out=out))
        assert message.endswith("alike: pass torch.empty_like(aligned), or no out"), message
    assert refusal(lambda: expo.extrapolate(s, aligned, ALPHA)).startswith("sft is a DTensor"), "aligned is no DTensor"
    # The local parts of 5 and of 6 rows have equal shapes in one of the processes.
    more = distribute_tensor(tensor((6, 3), 1), mesh, [Shard(0)])
    assert refusal(lambda: expo.extrapolate(more, a, ALPHA)).startswith("shapes differ: sft (6, 3), aligned (5, 3)")


def check_that_parts_of_other_sizes_are_refused(mesh: DeviceMesh) -> None:
    """torch gives the first process 3 of 5 rows; a kernel must not read 3 rows where there are 2."""
    rank = torch.distributed.get_rank()
    odd = DTensor.from_local(
        tensor((2 + rank, 3), 1), mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 3)), stride=(3, 1)
    )
    even = distribute_tensor(tensor((5, 3), 2), mesh, [Shard(0)])
    words = "this process's part of {} has the shape {}, but that of {} has the shape {}: make both DTensors by"
    shapes = (3 - rank, 3), (2 + rank, 3)
    message = refusal(lambda: expo.extrapolate(odd, even, ALPHA))
    assert message.startswith(words.format("aligned", shapes[0], "sft", shapes[1])), message
    models = [torch.nn.Module() for _ in range(2)]
    for model, weight in zip(models, (odd, even), strict=True):
        model.weight = torch.nn.Parameter(weight)
    message = refusal(lambda: expo.Live(models[1], models[0]))
    assert message.startswith(words.format("model: weight", shapes[0], "sft: weight", shapes[1])), message
    with tempfile.TemporaryDirectory() as folder:
        save_file({"weight": torch.zeros(5, 3)}, f"{folder}/sft.safetensors")
        message = refusal(lambda: expo.Live(models[0], f"{folder}/sft.safetensors"))
    assert "with parts of the sizes that distribute_tensor gives" in message, message


class Model(torch.nn.Module):
    """A model with two linear layers and a buffer; two processes cannot share the three rows of a matrix evenly."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 6, dtype=dtype), torch.nn.Linear(6, 3, dtype=dtype)
        self.register_buffer("bias", tensor((3,), seed, torch.float32))
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(tensor(parameter.shape, 10 * seed + number, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) + self.bias


def by_fsdp(model: Model) -> Model:
    """Return the model with a part of each parameter in each process."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))  # the default is a GPU, where there is one
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_tensor_parallel(model: Model) -> Model:
    """Return the model with rows of one matrix and columns of the other in each process, and copies of one bias."""
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    placements = [each.placements[0] for each in (model.up.weight, model.down.weight, model.down.bias)]
    assert placements == [Shard(0), Shard(1), Replicate()]
    return model


def by_both(model: Model) -> Model:
    """Return the model with tensor parallel and FSDP on a mesh of two dimensions."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model.up, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    assert len(model.up.weight.placements) == 2
    return model


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of each whole weight."""
    weights = model.state_dict()
    return {name: each.full_tensor() if isinstance(each, DTensor) else each.clone() for name, each in weights.items()}


def check_live(spread: Callable[[Model], Model], keep: str) -> None:
    """Each alpha gives the weights and the outputs that it gives in one process, before and after a forward pass."""
    whole, model = Model(2), spread(Model(2))
    x = torch.ones(2, 3)
    sft = spread(Model(1))
    with torch.no_grad():
        sft(x)
    with expo.Live(whole, Model(1)) as expected, expo.Live(model, sft, keep=keep) as live:
        for alpha in (0.5, -1.5, 0.0, 0.3):
            with torch.no_grad():
                model(x)  # FSDP keeps whole copies of the outermost module's weights afterwards
            expected.alpha = live.alpha = alpha
            with torch.no_grad():
                assert torch.allclose(model(x), whole(x), atol=1e-5), "the forward pass has other weights"
            weights = whole_weights(model)
            assert all(equal(weights[name], each) for name, each in whole.state_dict().items())
            found = expo.extrapolate(sft.parameters(), model.parameters(), alpha)
            assert [each.placements for each in found] == [each.placements for each in model.parameters()]
        parts = [each.to_local() if isinstance(each, DTensor) else each for each in sft.state_dict().values()]
        originals = sum(each.nbytes for each in parts)
        assert live.memory == (originals if keep == "device" else 2 * originals)
    assert all(equal(whole_weights(model)[name], each) for name, each in Model(2).state_dict().items())


def check_live_by_fsdp(_: DeviceMesh) -> None:
    for keep in ("device", "host", "disk"):
        check_live(by_fsdp, keep)


def check_live_by_tensor_parallel(_: DeviceMesh) -> None:
    for keep in ("device", "host", "disk"):
        check_live(by_tensor_parallel, keep)


def check_live_by_both(_: DeviceMesh) -> None:
    check_live(by_both, "device")


def check_that_live_counts_its_writes(_: DeviceMesh) -> None:
    for spread in (by_tensor_parallel, by_fsdp):
        model = spread(Model(2))
        live = expo.Live(model, spread(Model(1)))
        for alpha in (0.5, 0.0):
            loss = model(torch.ones(2, 3)).sum()
            live.alpha = alpha
            message = refusal(loss.backward, RuntimeError)
            assert "modified by an inplace operation" in message, message


def check_that_live_refuses_other_placements(mesh: DeviceMesh) -> None:
    model = by_fsdp(Model(2))
    message = refusal(lambda: expo.Live(model, by_tensor_parallel(Model(1))))
    assert message.startswith("model: down.weight is a DTensor of placements (Shard(dim=0),) on the cpu mesh"), message
    assert "sft: down.weight is a DTensor of placements (Shard(dim=1),)" in message
    assert message.endswith("apply the same fully_shard() or parallelize_module() to both models")
    for one, other in ((model, Model(1)), (Model(2), by_fsdp(Model(1)))):
        message = refusal(lambda one=one, other=other: expo.Live(one, other))
        assert "up.weight is a Parameter, which is no DTensor" in message, message
    partial = Model(2)
    partial.up.weight = torch.nn.Parameter(DTensor.from_local(partial.up.weight.detach(), mesh, [Partial()]))
    assert "the processes have not yet combined its elements" in refusal(lambda: expo.Live(partial, partial))


def check_that_live_reads_parts_of_files(mesh: DeviceMesh) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/sft.safetensors"
        save_file(Model(1).state_dict(), file)
        for spread in (by_fsdp, by_tensor_parallel, by_both):
            for keep in ("device", "disk"):
                whole, model = (Model(2, torch.bfloat16) for _ in range(2))
                model = spread(model)
                expected, live = (expo.Live(each, file, keep=keep) for each in (whole, model))
                expected.alpha = live.alpha = ALPHA
                weights = whole_weights(model)
                assert all(equal(weights[name], each) for name, each in whole.state_dict().items())
                assert live.memory < expected.memory
        scalar = torch.nn.Module()
        scalar.weight = torch.nn.Parameter(distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))
        save_file({"weight": torch.tensor(1.0)}, file)
        expo.Live(scalar, file).alpha = 0.5
        assert scalar.weight.item() == 2.5


def check_that_live_refuses_parts_that_no_file_has(_: DeviceMesh) -> None:
    model = torch.nn.Module()
    mesh = init_device_mesh("cpu", (2, 1))
    placements = [_StridedShard(0, split_factor=1), Shard(0)]
    model.weight = torch.nn.Parameter(DTensor.from_local(tensor((3, 4), 1), mesh, placements))
    with tempfile.TemporaryDirectory() as folder:
        save_file({"weight": torch.zeros(6, 4)}, f"{folder}/sft.safetensors")
        message = refusal(lambda: expo.Live(model, f"{folder}/sft.safetensors"))
    assert message.startswith("model: weight is a DTensor of placements (_StridedShard("), message
    assert message.endswith("load sft as a second model, distribute it like this model, and give it as sft"), message


def check_that_live_refuses_rows(_: DeviceMesh) -> None:
    models = [torch.nn.Module() for _ in range(2)]
    for rows, model in zip((5, 7), models, strict=True):
        model.embed_tokens = torch.nn.Embedding(rows, 4)
        by_fsdp_alone(model)
    words = (
        "model: embed_tokens.weight is a DTensor of shape ({}, 4), and sft has the shape ({}, 4): on_mismatch='rows'"
    )
    for (one, other), rows in ((models[::-1], (7, 5)), (models, (5, 7))):
        message = refusal(lambda one=one, other=other: expo.Live(one, other, on_mismatch="rows"))
        assert message.startswith(words.format(*rows)), message


def by_fsdp_alone(model: torch.nn.Module) -> None:
    """Spread a model as one group."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_") and name != "check_live"}


def main(store: str, rank: int) -> None:
    """Run all checks as one of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    errors = {}
    for name, check in CHECKS.items():
        try:
            check(mesh)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
    print(json.dumps(errors), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
