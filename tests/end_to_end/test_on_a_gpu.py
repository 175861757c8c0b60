"""The whole way of a user of a GPU, on the GPU in software of `software_cuda`: the bits are those of the CPU.

Every test asserts that kernels have computed, because pieces below 64 KiB go to the CPU.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

import ptx
from safetensors.torch import save_file
from searches import quiet_transformers, search_demo
from software_cuda import CudaLauncher, SoftwareCuda
from tiny_models import LOAD

import expo
from expo import op
from expo.demo import ALIGNED, SFT
from expo.dtypes import torch_dtypes
from expo.execution import gpu_fallback
from expo.execution.engines import choose
from expo.execution.tensor_source import TensorSource
from expo.inputs.resolve import open_inputs
from expo.kernels import device, direct, extrapolate, selftest, whole_model
from expo.kernels.contract import Operand, extrapolation
from expo.kernels.pinned import pinned
from expo.options import MergeOptions
from expo.planning.matching import match_tensors
from expo.planning.steps import by_tensor
from expo.tensors.device_stream import DeviceStream

if extrapolate.interpreted():
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)

ALPHA = 0.3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareCuda]:
    """A machine with three GPUs, whose kernels pass their self-test once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
        patch.setattr(selftest, "_passed", set())
        yield SoftwareCuda(3)


@pytest.fixture
def gpu(machine: SoftwareCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftwareCuda]:
    """The machine, without work and without a device that was given up; work runs only when the host waits for it."""
    monkeypatch.setattr(gpu_fallback, "_given_up", {})
    monkeypatch.setattr(gpu_fallback, "_ran_out", set())
    machine.reset()
    with machine.active():
        selftest.check(torch.device("cuda", 0))
        machine.reset()
        yield machine
        faults, machine.registered.faults = machine.registered.faults, []
        assert faults == []


def same(on_gpu: torch.Tensor, on_cpu: torch.Tensor) -> bool:
    """Return True if two tensors have the same bits."""
    here = on_gpu.detach().cpu().contiguous()
    return here.dtype == on_cpu.dtype and torch.equal(
        here.view(torch.uint8), on_cpu.detach().contiguous().view(torch.uint8)
    )


def same_but_nan(on_gpu: torch.Tensor, on_cpu: torch.Tensor) -> bool:
    """Return True if two tensors have the same bits, but for the payloads of NaNs."""
    here, there = on_gpu.detach().cpu(), on_cpu.detach()
    zero = torch.zeros((), dtype=there.dtype)
    return same(here.where(~here.isnan(), zero), there.where(~there.isnan(), zero)) and torch.equal(
        here.isnan(), there.isnan()
    )


def computed(gpu: SoftwareCuda) -> int:
    """Return the bytes that kernels have written, when all work is done."""
    for index in range(gpu.scheduler.devices):
        torch.cuda.synchronize(index)
    return gpu.written


# Tensors


@pytest.mark.parametrize("aligned_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sft_dtype", DTYPES, ids=str)
def test_a_tensor(gpu: SoftwareCuda, sft_dtype: torch.dtype, aligned_dtype: torch.dtype) -> None:
    sft, aligned = torch.randn(5003).to(sft_dtype), torch.randn(5003).to(aligned_dtype)
    expected = expo.extrapolate(sft, aligned, ALPHA)
    out = expo.extrapolate(sft.cuda(), aligned.cuda(), ALPHA)
    assert out.is_cuda
    assert same(out, expected)
    assert computed(gpu) == out.nbytes


def test_a_list_of_all_kinds(gpu: SoftwareCuda) -> None:
    """A list may have tied and empty tensors, views, odd addresses, and tensors that no kernel takes."""
    torch.manual_seed(1)
    plain, odd = torch.randn(3000).bfloat16(), torch.randn(2001).half()
    aligned = [plain, odd[1:], torch.empty(0), torch.randn(40, 50).T, torch.randn(7).double(), plain]
    sft = [torch.randn_like(each) for each in aligned]
    sft[5] = sft[0]
    expected = expo.extrapolate(sft, aligned, ALPHA)
    on_gpu = [[each.cuda() for each in tensors] for tensors in (sft, aligned)]
    on_gpu[1][1] = odd.cuda()[1:]
    on_gpu[0][5], on_gpu[1][5] = on_gpu[0][0], on_gpu[1][0]
    assert on_gpu[1][1].data_ptr() % 16
    outs = expo.extrapolate(iter(on_gpu[0]), iter(on_gpu[1]), ALPHA)
    assert all(same(out, right) for out, right in zip(outs, expected, strict=True))
    assert computed(gpu) >= plain.nbytes + odd.nbytes - 2
    assert "whole_model" in {name for name, _, _ in gpu.launches}


def test_in_place_and_on_another_stream(gpu: SoftwareCuda) -> None:
    sft, aligned = torch.randn(4096).bfloat16(), torch.randn(4096).bfloat16()
    expected = expo.extrapolate(sft, expo.extrapolate(sft, aligned, ALPHA), 0.5)
    s, a = sft.cuda(), aligned.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expo.extrapolate(s, a, ALPHA, out=a)
        expo.extrapolate([s], [a], 0.5, out=[a])
    torch.cuda.current_stream().wait_stream(stream)
    assert same(a, expected)
    assert not gpu.scheduler.broken


def test_the_operator(gpu: SoftwareCuda) -> None:
    sft, aligned = torch.randn(3000), torch.randn(3000)
    expected = op.extrapolate(sft, aligned, ALPHA)
    assert same(torch.ops.expo.extrapolate(sft.cuda(), aligned.cuda(), ALPHA), expected)
    assert computed(gpu) >= 12_000


def test_a_device_that_is_not_the_current_one(gpu: SoftwareCuda) -> None:
    sft, aligned = torch.randn(3000), torch.randn(3000)
    expected = expo.extrapolate(sft, aligned, ALPHA)
    out = expo.extrapolate(sft.to("cuda:1"), aligned.to("cuda:1"), ALPHA)
    pairs = [(sft.to(where), aligned.to(where)) for where in ("cuda:1", "cuda:0")]
    outs = expo.extrapolate([s for s, _ in pairs], [a for _, a in pairs], ALPHA)
    assert [each.device.index for each in (out, *outs)] == [1, 1, 0]
    assert all(same(each, expected) for each in (out, *outs))
    assert {index for name, _, index in gpu.launches if name == "whole_model"} == {0, 1}


# Models


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that a merge on the CPU writes."""
    from safetensors.torch import load_file

    out = tmp_path_factory.mktemp("cpu") / "out"
    expo.merge(SFT, ALIGNED, ALPHA, out)
    return {name: each for path in sorted(out.glob("*.safetensors")) for name, each in load_file(path).items()}


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_live(gpu: SoftwareCuda, merged: dict[str, torch.Tensor], keep: str) -> None:
    with quiet_transformers():
        model = LOAD(ALIGNED, dtype=torch.bfloat16)
    original = {name: each.clone() for name, each in model.state_dict().items()}
    model.to("cuda")
    with expo.Live(model, SFT, keep=keep) as live:
        for alpha in (0.9, ALPHA):
            live.alpha = alpha
        weights = model.state_dict()
        assert all(weights[name].is_cuda for name in merged)
        assert all(same(weights[name], merged[name]) for name in merged)
        assert computed(gpu) >= 2 * sum(each.nbytes for each in merged.values())
    assert all(same(weights[name], original[name]) for name in merged)


class Small(torch.nn.Module):
    """Weights of all dtypes, with numbers at which alpha 0 must copy: -0, inf and NaN."""

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        special = torch.tensor([-0.0, float("inf"), float("nan"), 1e-40])
        self.all = torch.nn.ParameterList([torch.cat([special, torch.randn(3000)]).to(dtype) for dtype in dtypes])


def graph_of(live: Any, alpha: torch.Tensor) -> Any:
    """Return a graph that has captured the setting of an alpha in a tensor."""
    live.alpha = alpha
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        live.alpha = alpha
    return graph


def test_a_graph_of_live_follows_the_tensor(gpu: SoftwareCuda) -> None:
    """A replay computes the weights of the number that the tensor has then, and copies aligned's bits for 0."""
    aligned, sft = Small(1), Small(2)
    originals = [each.detach().clone() for each in aligned.all]
    expected = {
        alpha: [expo.extrapolate(s.detach(), a.detach(), alpha) for s, a in zip(sft.all, aligned.all, strict=True)]
        for alpha in (0.5, -1.25, 0.3)
    }
    expected[0.0] = expected[-0.0] = originals
    model = aligned.to("cuda")
    with expo.Live(model, sft.to("cuda"), alpha_for={r"all\.0": 0.25}) as live:
        fixed = expo.extrapolate(sft.all[0].detach().cpu(), originals[0], 0.25)
        alpha = torch.full((), 0.3, device="cuda")
        graph = graph_of(live, alpha)
        assert live.alpha is alpha
        for value in (0.5, 0.0, -1.25, -0.0, 0.3):
            for weight in model.all:
                weight.detach().zero_()
            alpha.fill_(value)
            before = computed(gpu)
            graph.replay()
            assert computed(gpu) - before == sum(each.nbytes for each in originals)
            is_same = same if value == 0 else same_but_nan
            assert same_but_nan(model.all[0], fixed)
            assert all(is_same(weight, right) for weight, right in zip(model.all[1:], expected[value][1:], strict=True))
        live.alpha = 0.5
        assert all(same_but_nan(w, right) for w, right in zip(model.all[1:], expected[0.5][1:], strict=True))
    assert all(same(weight, right) for weight, right in zip(model.all, originals, strict=True))


def test_the_graph_of_the_documentation(
    gpu: SoftwareCuda, merged: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/python.md sets the weights that it says; its last lines restore aligned."""
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "CUDAGraph" in block)
    assert code.count("alpha.fill_(0.7)") == 1
    monkeypatch.chdir(Path(__file__).parents[2])
    code = code.replace("fill_(0.7)", f"fill_({ALPHA})").replace("0.3, device", "0.9, device")
    shown: dict[str, Any] = {}
    with quiet_transformers():
        exec(f"{code}        weights = {{name: each.clone() for name, each in model.state_dict().items()}}", shown)
    assert all(same(shown["weights"][name], merged[name]) for name in merged)


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_a_graph_captures_no_work_of_the_host(gpu: SoftwareCuda, keep: str) -> None:
    with expo.Live(Small(1).to("cuda"), Small(2), keep=keep) as live:
        alpha = torch.full((1,), 0.3, device="cuda")
        live.alpha = alpha  # the host reads the number here
        assert live.alpha == alpha.item()
        graph = torch.cuda.CUDAGraph()
        for value, message in ((alpha, "only a tensor that was set before"), (0.4, "work of the host")):
            with torch.cuda.graph(graph), pytest.raises(expo.UsageError, match=message):
                live.alpha = value


def test_a_tensor_that_was_not_set_before_a_capture_is_refused(gpu: SoftwareCuda) -> None:
    """Its kernel may need a compiler, and the table of addresses a copy from the host. The advice is followed."""
    model = Small(1).to("cuda")
    with expo.Live(model, Small(2).to("cuda")) as live:
        alpha = torch.full((1,), 0.5, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(expo.UsageError, match="set before the capture"):
            live.alpha = alpha
        graph = graph_of(live, alpha)
        graph.replay()
        right = expo.extrapolate(Small(2).all[2].detach(), Small(1).all[2].detach(), 0.5)
        assert same_but_nan(model.all[2], right)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            live.alpha = 0.25  # a number is a constant of the graph


def test_a_kernel_that_fails_with_an_alpha_in_a_tensor(gpu: SoftwareCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(1).to("cuda")
    with expo.Live(model, Small(2).to("cuda")) as live:
        live.alpha = 0.1
        with monkeypatch.context() as patch:
            patch.setattr(CudaLauncher, "__call__", lambda *_, **__: (_ for _ in ()).throw(OSError("no assembler")))
            with (
                pytest.warns(RuntimeWarning, match="no assembler"),
                pytest.raises(expo.EngineError, match=r"set a number as alpha\. OSError: no assembler"),
            ):
                live.alpha = torch.full((1,), 0.5, device="cuda")
        assert live.alpha is None
        live.alpha = 0.5
        assert same_but_nan(model.all[1], expo.extrapolate(Small(2).all[1].detach(), Small(1).all[1].detach(), 0.5))


@pytest.mark.parametrize("options", [{"engine": "triton"}, {"engine": "cpu"}, {"device": "cuda"}], ids=str)
def test_a_stream_to_the_gpu(gpu: SoftwareCuda, merged: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """Where the GPU computes, both inputs go up; else the result goes up. Nothing comes down."""
    found = dict(expo.stream(SFT, ALIGNED, ALPHA, to="cuda", **options))
    size = sum(each.nbytes for each in merged.values())
    assert gpu.moved == {"up": size if "cpu" in options.values() else 2 * size, "down": 0}
    assert found.keys() == merged.keys()
    assert all(each.is_cuda and same(each, merged[name]) for name, each in found.items())
    if "cpu" not in options.values():
        assert computed(gpu) == size


def test_a_stream_of_tensors_that_are_only_copied(gpu: SoftwareCuda, tmp_path: Path) -> None:
    kept = {
        "ids": torch.arange(5), "mask": torch.tensor([True, False, True]), "scalar": torch.tensor(7, dtype=torch.uint8),
        "freqs_cis": torch.polar(torch.ones(3), torch.arange(3.0)), "none": torch.zeros(0, 4, dtype=torch.int32),
    }  # fmt: skip
    for role, weight in (("sft", 1.0), ("aligned", 2.0)):
        save_file({"w": torch.full((4,), weight), **kept}, tmp_path / f"{role}.safetensors")
    paths = (tmp_path / "sft.safetensors", tmp_path / "aligned.safetensors")
    for options in ({"engine": "cpu"}, {"device": "cuda"}):
        found = dict(expo.stream(*paths, 0.5, to="cuda", **options))
        assert torch.equal(found.pop("w").cpu(), torch.full((4,), 2.5))
        assert found.keys() == kept.keys()
        for name, tensor in found.items():
            assert tensor.is_cuda
            assert tensor.dtype == kept[name].dtype
            assert torch.equal(tensor.cpu(), kept[name])


@pytest.mark.parametrize("fault", ["engine", "device"])
def test_a_stream_whose_kernels_fail(
    gpu: SoftwareCuda, merged: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """An engine that was asked for by name fails; without a name torch computes, with one warning."""

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no assembler")

    options: dict[str, Any] = {"engine": "triton"} if fault == "engine" else {"device": "cuda"}
    stream = expo.stream(SFT, ALIGNED, ALPHA, to="cuda", **options)
    monkeypatch.setattr(CudaLauncher, "__call__", broken)
    if fault == "engine":
        with pytest.raises(expo.EngineError, match=r"`engine='triton'` failed on .*: OSError: no assembler"):
            list(stream)
        return
    with pytest.warns(RuntimeWarning, match="no assembler"):
        found = dict(stream)
    assert all(same(each, merged[name]) for name, each in found.items())


@pytest.mark.parametrize("engine", ["triton", "cpu"])
def test_a_stream_that_stops_waits_for_its_uploads(
    gpu: SoftwareCuda, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Memory of the GPU that a stopped computation gives up has no copies or kernels to come."""
    monkeypatch.setattr("expo.tensors.device_stream.CHUNK", 4096)
    stream_to = torch.device("cuda", 0)
    with open_inputs(SFT, ALIGNED) as (sft, aligned):
        matched = match_tensors(sft, aligned, MergeOptions())
        tensor, steps = next(by_tensor(step for step in matched.with_alphas((ALPHA,)) if step.nbytes > 3 * 4096))
        source, chosen = TensorSource(sft, aligned), choose(engine, "cuda" if engine == "triton" else "auto")
        answers = iter([False, False, True])
        assert DeviceStream(source, chosen, stream_to).compute(tensor, steps, lambda: next(answers)) is None
    torch.cuda.synchronize()
    assert all(stream.query() for stream in gpu.scheduler.streams)
    assert gpu.moved["up"] > 0


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_a_search(gpu: SoftwareCuda, tmp_path: Path) -> None:
    with quiet_transformers():
        on_cpu = search_demo(tmp_path / "cpu", max_new_tokens=2, alphas=[0.2])
        on_gpu = search_demo(tmp_path / "gpu", max_new_tokens=2, alphas=[0.2], device="cuda")
    assert on_gpu.best == on_cpu.best
    assert computed(gpu) > 1_000_000


# Merges from file to file


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("order", ["needed", "at once", 7])
def test_a_merge(gpu: SoftwareCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str | int) -> None:
    """The ring gives the CPU's files on every device and in every legal order of work."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 256 << 10)
    expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "cpu")
    gpu.reset(order)
    index = ["needed", "at once", 7].index(order)
    done = expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "gpu", engine="triton", device=f"cuda:{index}", verify=True)
    assert weight_bytes(tmp_path / "gpu") == weight_bytes(tmp_path / "cpu")
    assert done.engine == "triton"
    assert {device for name, _, device in gpu.launches} == {index}
    assert computed(gpu) > 1_000_000


# Pinned memory


def test_pinned_memory_has_the_size_asked_for(gpu: SoftwareCuda) -> None:
    """80 MB do not become 128, and the memory is unregistered with the last view of the tensor."""
    size, before = 80_000_000, dict(gpu.registered.sizes)  # of other tests, which the collector has not freed yet

    def registered() -> dict[int, int]:
        return {start: each for start, each in gpu.registered.sizes.items() if start not in before}

    memory = pinned(size, [torch.device("cuda", 0)])
    view = memory[4096:8192]
    assert registered() == {memory.data_ptr(): size}
    assert memory.data_ptr() % 4096 == 0
    assert memory.is_pinned()
    del memory
    assert list(registered().values()) == [size]
    del view
    assert registered() == {}


def use_pinned_memory(tmp_path: Path, use: str) -> None:
    """Merge through the ring, stream to the GPU, or set an alpha with originals in the host's memory."""
    if use == "merge":
        expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "out", engine="triton")
    elif use == "stream":
        for _ in expo.stream(SFT, ALIGNED, ALPHA, to="cuda", engine="cpu"):
            pass
    else:
        with expo.Live(Small(1).to("cuda"), Small(2), keep="host") as live:
            live.alpha = ALPHA


@pytest.mark.parametrize("use", ["merge", "stream", "live"])
def test_all_pinned_memory_is_returned(gpu: SoftwareCuda, tmp_path: Path, use: str) -> None:
    """Memory is registered while it is needed, and no copy uses it when it is freed (the fixture asserts that)."""
    gc.collect()
    seen, before = [], set(gpu.registered.sizes)
    register = gpu.registered.cudaHostRegister
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.registered, "cudaHostRegister", lambda *each: seen.append(each[1]) or register(*each))
        use_pinned_memory(tmp_path, use)
    gc.collect()
    assert seen
    assert set(gpu.registered.sizes) <= before


@pytest.mark.parametrize("use", ["merge", "stream", "live"])
def test_a_system_that_registers_no_memory(
    gpu: SoftwareCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """torch's own pinned memory takes the place of registered memory, with the same bits."""
    monkeypatch.setattr(gpu.registered, "limit", 0)
    before = set(gpu.registered.sizes)
    use_pinned_memory(tmp_path, use)
    assert set(gpu.registered.sizes) <= before
    if use == "merge":
        expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "cpu")
        assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "cpu")


def test_memory_that_is_freed_without_a_wait_is_noticed(gpu: SoftwareCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the fixture above can fail: this copy is still under way when its memory is freed."""
    monkeypatch.setattr("expo.kernels.pinned.wait", lambda devices: None)
    memory = pinned(4096, [torch.device("cuda", 0)])
    target = torch.empty(4096, dtype=torch.uint8, device="cuda")
    target.copy_(memory, non_blocking=True)
    address = memory.data_ptr()
    del memory
    assert gpu.registered.faults == [f"{address:#x} was freed while a copy used it"]
    gpu.registered.faults.clear()
    gpu.reset()  # without the copy, whose memory is gone


# A GPU that uses the host's page tables


@pytest.fixture
def direct_gpu(gpu: SoftwareCuda) -> Iterator[SoftwareCuda]:
    """The machine, whose driver says that its GPUs use the host's page tables."""
    gpu.host_page_tables = True
    direct.uses_host_page_tables.cache_clear()
    yield gpu
    gpu.host_page_tables = False
    direct.uses_host_page_tables.cache_clear()


@pytest.mark.parametrize("options", [{"engine": "triton"}, {"device": "cuda:1"}], ids=str)
def test_a_merge_without_copies(direct_gpu: SoftwareCuda, tmp_path: Path, options: dict[str, Any]) -> None:
    """The kernel reads the mapped files and writes the buffers that go to the disk; three alphas share one read."""
    alphas = [0.3, 0.5, -0.2]
    selftest.check(torch.device(options.get("device", "cuda:0")))
    direct_gpu.reset()
    right = expo.merge(SFT, ALIGNED, alphas, tmp_path / "cpu-{alpha}")
    done = expo.merge(SFT, ALIGNED, alphas, tmp_path / "gpu-{alpha}", verify=True, **options)
    for one, other in zip(done.outputs, right.outputs, strict=True):
        assert weight_bytes(Path(one.path)) == weight_bytes(Path(other.path)) != {}
    assert done.relative_distance == pytest.approx(right.relative_distance, rel=1e-6)
    assert {name for name, _, _ in direct_gpu.launches} == {"sweep_addresses"}
    if "engine" in options:
        assert computed(direct_gpu) > 3_000_000
        assert done.shares.keys() == {"triton"}
    assert direct_gpu.moved["up"] + direct_gpu.moved["down"] < 200_000  # alphas, and statistics


@pytest.mark.parametrize(
    ("dtypes", "sft_shift", "aligned_shift", "out_shift", "outputs"),
    [
        (("BF16", "BF16"), 0, 0, 0, 1),
        (("BF16", "BF16"), 2, 0, 0, 3),
        (("BF16", "BF16"), 1, 3, 0, 3),
        (("F32", "F16"), 0, 2, 1, 2),
        (("F16", "F32"), 2, 1, 2, 1),
        (("F64", "F32"), 0, 0, 0, 1),
    ],
)
def test_host_memory_at_any_address(
    direct_gpu: SoftwareCuda, dtypes: tuple[str, str], sft_shift: int, aligned_shift: int, out_shift: int, outputs: int
) -> None:
    """Addresses may be no multiples of 16 bytes, nor of an element, and outputs may be anywhere."""
    n, rng = 5001, np.random.default_rng(5)
    host = []
    for dtype, shift in zip(dtypes, (sft_shift, aligned_shift), strict=True):
        kind = torch_dtypes()[dtype]
        numbers = torch.from_numpy(rng.standard_normal(n)).to(kind).view(torch.uint8).numpy().tobytes()
        host.append(Operand(memoryview(bytearray(shift) + numbers)[shift:], dtype))
    size = len(host[1].memory)
    run = direct.DirectEngine(torch.device("cuda", 0))
    alphas = [0.3, -1.5, 0.7][:outputs]
    results = []
    for engine in (choose("numpy").run, run):
        outs = [memoryview(bytearray(size + out_shift))[out_shift:] for _ in alphas]
        statistics = engine(*extrapolation(*host, alphas), outs, True)
        assert statistics is not None
        results.append(([bytes(out) for out in outs], statistics.counts, statistics.max_abs_d))
    assert results[0] == results[1]
    assert bool(direct_gpu.launches) == ("F64" not in dtypes)


def test_the_driver_is_asked_for_page_tables(gpu: SoftwareCuda) -> None:
    direct.uses_host_page_tables.cache_clear()
    assert not choose("triton").direct
    assert choose("triton").streams
    direct.uses_host_page_tables.cache_clear()


def test_wrong_bits_in_host_memory(direct_gpu: SoftwareCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for memory of the host has a self-test too; after a failure the CPU takes the GPU's place."""
    launch = direct.DirectEngine._launch
    monkeypatch.setattr(
        direct.DirectEngine,
        "_launch",
        lambda self, inputs, dtypes, alphas, *rest: launch(self, inputs, dtypes, [2 * each for each in alphas], *rest),
    )
    with pytest.raises(expo.EngineError, match="sweep_addresses gives wrong bits"):
        choose("triton")
    assert "sweep_addresses gives wrong bits" in choose("auto", "cuda").note


def test_a_compiler_that_fails_before_a_merge_without_copies(
    direct_gpu: SoftwareCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no assembler")

    selftest.check(torch.device("cuda", 0))
    monkeypatch.setattr(CudaLauncher, "__call__", broken)
    with pytest.raises(expo.EngineError, match=r"cannot be used on cuda:0: .*no assembler"):
        expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "out", engine="triton")
    assert list(tmp_path.iterdir()) == []


# Faults of the host's code are found


def broken_merge(tmp_path: Path) -> bool:
    """Return True if a merge by kernels fails or gives other files than the CPU."""
    expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "cpu")
    try:
        expo.merge(SFT, ALIGNED, ALPHA, tmp_path / "gpu", engine="triton")
    except expo.ExpoError:
        return True
    return weight_bytes(tmp_path / "gpu") != weight_bytes(tmp_path / "cpu")


@pytest.mark.parametrize("fault", ["no wait between streams", "work on the default stream", "no wait of the host"])
def test_faults_of_the_ring(gpu: SoftwareCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 256 << 10)
    if fault == "no wait between streams":
        monkeypatch.setattr(device.Cuda, "wait", lambda *_: None)
    elif fault == "no wait of the host":
        monkeypatch.setattr(device.Cuda, "synchronize", lambda *_: None)
    else:
        monkeypatch.setattr(device.Cuda, "enqueue", lambda self, stream, work: work())
    assert broken_merge(tmp_path)


def test_a_launch_on_the_wrong_device(gpu: SoftwareCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    selftest.check(torch.device("cuda", 1))
    monkeypatch.setattr(extrapolate, "launching", lambda tensor: contextlib.nullcontext())
    with pytest.warns(RuntimeWarning, match="cannot be accessed"):
        expo.extrapolate(torch.ones(3000, device="cuda:1"), torch.ones(3000, device="cuda:1"), ALPHA)


def test_a_table_that_is_freed_too_early(gpu: SoftwareCuda) -> None:
    """A table that belongs to one stream may not be freed while another stream's launch has not read it."""
    tensors = [torch.randn(3000, device="cuda") for _ in range(3)]
    table = whole_model.Table(*([each] for each in tensors))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        table.launch(0.3)
    del table
    with pytest.raises(ptx.Fault, match="freed"):
        other.synchronize()


def test_weights_that_have_moved(gpu: SoftwareCuda) -> None:
    """A table of addresses that are freed is seen by the kernel: nothing but `Live`'s own check keeps users from it."""
    sft, aligned, out = (torch.randn(3000, device="cuda") for _ in range(3))
    table = whole_model.Table([sft], [aligned], [out])
    del out
    table.launch(0.3)
    with pytest.raises(ptx.Fault, match="freed"):
        torch.cuda.synchronize()
