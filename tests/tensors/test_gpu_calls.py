"""Repeated calls on a GPU use the table of an earlier call only if everything that the kernel reads is the same.

The GPU is simulated (`software_gpu`), and tensors on the CPU take the place of a GPU's tensors.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

from software_gpu import SoftwareGpu

import expo
from expo.execution import gpu_fallback
from expo.kernels import extrapolate, selftest, torch_eager, whole_model
from expo.kernels.contract import tensor_extrapolation, working_alpha
from expo.tensors import gpu_calls, gpu_tensors, live

if extrapolate.interpreted():
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)

CPU = torch.device("cpu")
ALPHA = 0.3
SHAPES = ((30, 40), (7,), (5, 1, 3))
Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def software(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareGpu]:
    """Yield a GPU that has passed the self-test, with an empty cache of tables."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(selftest, "_passed", {CPU})
    monkeypatch.setattr(gpu_fallback, "_given_up", {})
    monkeypatch.setattr(gpu_fallback, "_ran_out", set())
    monkeypatch.setattr(gpu_tensors, "on_gpu", lambda _: True)
    monkeypatch.setattr(live, "_on_cpu", lambda _: False)
    monkeypatch.setattr(gpu_calls, "tables", gpu_calls.TableCache())
    with SoftwareGpu().active() as made:
        yield made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[whole_model.Table]:
    """Return a list that gets every table that is made."""
    tables: list[whole_model.Table] = []
    make = gpu_tensors.make_table
    monkeypatch.setattr(gpu_tensors, "make_table", lambda triples: (tables.append(make(triples)), tables[-1])[1])
    return tables


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


def expected(sft: torch.Tensor, aligned: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    s, a = sft.detach().contiguous(), aligned.detach().contiguous()
    out = torch.empty_like(a)
    torch_eager.extrapolate(*tensor_extrapolation(s, a, (working_alpha(alpha),)), [out], False)
    return out


def all_equal(found: Any, right: Any) -> bool:
    return all(torch.equal(x.detach(), y) for x, y in zip(found, right, strict=True))


def cached() -> list[Any]:
    return gpu_calls.tables._entries


# Lists


@pytest.mark.parametrize("give", [list, tuple, iter], ids=lambda f: f.__name__)
@pytest.mark.parametrize("parameters", [False, True])
def test_the_second_call_makes_no_table(
    give: Callable[[Any], Any], parameters: bool, made: list[Any], software: SoftwareGpu
) -> None:
    """The second call in place starts from the result of the first one."""
    sft, aligned = tensors(1), tensors(2)
    if parameters:
        sft, aligned = ([torch.nn.Parameter(tensor) for tensor in each] for each in (sft, aligned))
    for alpha in (ALPHA, -0.7, ALPHA):
        right = [expected(s, a, alpha) for s, a in zip(sft, aligned, strict=True)]
        found = expo.extrapolate(give(sft), give(aligned), alpha, out=give(aligned))
        assert all(x is y for x, y in zip(found, aligned, strict=True))
        assert all_equal(aligned, right)
    assert len(made) == len(cached()) == 1
    assert {name for name, _ in software.launches} == {"whole_model"}


def test_two_dtypes_an_odd_address_and_new_contents(made: list[Any]) -> None:
    """The table has a group for each pair of dtypes and each alignment; the contents may change between two calls."""
    sft, aligned = [*tensors(1), *tensors(2, torch.float32)], [*tensors(3), *tensors(4, torch.float16)]
    aligned.append(torch.randn(101).bfloat16()[1:])
    sft.append(torch.randn(100).bfloat16())
    outs = [torch.empty_like(a) for a in aligned]
    for _ in range(2):
        expo.extrapolate(sft, aligned, ALPHA, out=outs)
        assert all_equal(outs, [expected(s, a) for s, a in zip(sft, aligned, strict=True)])
        for tensor in (*sft, *aligned):
            tensor.mul_(-1.5)
    assert len(made) == 1
    assert len(made[0].groups) == 3


def test_other_tensors_at_the_same_addresses_use_the_table(made: list[Any]) -> None:
    memory = [torch.randn(3000).bfloat16() for _ in range(3)]
    for _ in range(2):
        sft, aligned, outs = ([each[:1000].view(10, 100), each[1000:]] for each in memory)
        expo.extrapolate(sft, aligned, ALPHA, out=outs)
        assert all_equal(outs, [expected(s, a) for s, a in zip(sft, aligned, strict=True)])
        memory[0].add_(1)
    assert len(made) == 1


def test_the_cache_holds_no_tensor() -> None:
    sft, aligned, outs = tensors(1), tensors(2), tensors(3)
    for _ in range(2):
        expo.extrapolate(sft, aligned, ALPHA, out=outs)
    memories = [weakref.ref(tensor.untyped_storage()) for tensor in (*sft, *aligned, *outs)]
    assert len(cached()) == 1
    del sft, aligned, outs
    assert [memory() for memory in memories] == [None] * len(memories)


other = {
    "another address": lambda t: t.clone(),
    "another dtype": lambda t: t.view(torch.float16),
    "a wider dtype": lambda t: torch.as_strided(t.view(torch.float32), (1000,), (1,)),
    "another shape": lambda t: t.view(50, 40),
    "fewer elements": lambda t: t[:1999],
    "other strides": lambda t: t.as_strided((2000,), (0,)),
    "the negative": torch._neg_view,
    "a subclass": lambda t: t.as_subclass(Subclass),
}


class Subclass(torch.Tensor):
    """A subclass that owns its memory."""


@pytest.mark.parametrize("change", other.values(), ids=other.keys())
@pytest.mark.parametrize("role", ["sft", "aligned", "out"])
def test_what_is_not_the_same_is_another_key(change: Callable[[Any], Any], role: str) -> None:
    lists = {name: [torch.randn(2000).bfloat16(), torch.randn(3).bfloat16()] for name in ("sft", "aligned", "out")}
    key = gpu_calls.make_key(torch, **lists)
    again = {name: [tensor.detach() for tensor in each] for name, each in lists.items()}
    assert gpu_calls.make_key(torch, **again) == key is not None
    lists[role][0] = change(lists[role][0])
    assert gpu_calls.make_key(torch, **lists) != key


def test_lists_that_are_divided_in_another_way_are_another_key() -> None:
    six = [torch.randn(4).bfloat16() for _ in range(6)]
    in_place = gpu_calls.make_key(torch, six[:3], six[3:], six[3:])
    apart = gpu_calls.make_key(torch, six[:2], six[2:4], six[4:])
    assert None not in (in_place, apart)
    assert in_place != apart
    swapped = gpu_calls.make_key(torch, six[3:], six[:3], six[:3])
    assert swapped != in_place


def test_another_stream_is_another_key(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    """A table's memory is used in the order of one stream, so another stream gets a table of its own."""
    sft, aligned = tensors(1), tensors(2)
    for stream in (0, 7, 0, 7):
        monkeypatch.setattr(gpu_fallback, "current_stream", lambda _, stream=stream: stream)
        expo.extrapolate(sft, aligned, ALPHA, out=aligned)
    assert len(made) == 2


wrong = {
    "a shape": (lambda s, a, o: (s, [a[0].view(40, 30), *a[1:]], o), "shapes differ"),
    "a count": (lambda s, a, o: (s[:2], a, o), "as many of each"),
    "a dtype": (lambda s, a, o: (s, a, [o[0].view(torch.float16), *o[1:]]), "result has aligned's dtype"),
    "an overlap": (lambda s, a, o: (s, a, [o[0], o[0].view(-1)[5:12], o[2]]), r"out\[0\] and out\[1\] overlap"),
    "one memory": (lambda s, a, o: (s, a, [o[0].as_strided((30, 40), (0, 1)), *o[1:]]), "share memory"),
}


@pytest.mark.parametrize(("change", "message"), wrong.values(), ids=wrong.keys())
def test_wrong_lists_are_refused_after_right_ones(change: Callable[..., Any], message: str) -> None:
    lists = tensors(1), tensors(2), tensors(3)
    expo.extrapolate(*lists[:2], ALPHA, out=lists[2])
    sft, aligned, outs = change(*lists)
    before = [out.clone() for out in outs]
    with pytest.raises(expo.UsageError, match=message):
        expo.extrapolate(sft, aligned, ALPHA, out=outs)
    assert all_equal(outs, before)


def test_freed_memory_is_refused_after_a_right_call() -> None:
    sft, aligned = [torch.randn(100).bfloat16()[10:]], [torch.randn(90).bfloat16()]
    expo.extrapolate(sft, aligned, ALPHA, out=aligned)
    sft[0].untyped_storage().resize_(0)
    with pytest.raises(expo.UsageError, match="without memory of its own"):
        expo.extrapolate(sft, aligned, ALPHA, out=aligned)
    with pytest.raises(expo.UsageError, match="without memory of its own"):
        expo.extrapolate(sft[0], aligned[0], ALPHA, out=aligned[0])


def test_alphas_that_no_kernel_gets(made: list[Any]) -> None:
    sft, aligned, outs = tensors(1), tensors(2), tensors(3)
    expo.extrapolate(sft, aligned, ALPHA, out=outs)
    expo.extrapolate(sft, aligned, 0, out=outs)
    assert all_equal(outs, aligned)
    for alpha in (float("nan"), 1e39, "x", None):
        with pytest.raises(expo.UsageError, match="alpha must be a number"):
            expo.extrapolate(sft, aligned, alpha, out=outs)  # type: ignore[arg-type]
        with pytest.raises(expo.UsageError, match="alpha must be a number"):
            expo.extrapolate(sft[0], aligned[0], alpha, out=outs[0])  # type: ignore[arg-type]
    assert len(made) == 1


@pytest.mark.parametrize("failing", [False, True], ids=["launched", "by torch"])
def test_tied_weights_are_computed_once_each_time(
    failing: bool, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a later launch fails, torch computes the tensors of that call, and the second of two tied weights is left."""
    sft, aligned = tensors(1), tensors(2)
    sft, aligned = [sft[0], sft[0], *sft[1:]], [aligned[0], aligned[0], *aligned[1:]]
    for call in range(2):
        if failing and call:
            monkeypatch.setattr(whole_model.Group, "launch", lambda *_: 1 / 0)
        right = [expected(s, a) for s, a in zip(sft, aligned, strict=True)]
        if failing and call:
            with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
                expo.extrapolate(sft, aligned, ALPHA, out=aligned)
        else:
            expo.extrapolate(sft, aligned, ALPHA, out=aligned)
        assert all_equal(aligned, right)
    assert len(made) == 1


def test_torch_computes_parameters_if_a_later_launch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sft, aligned = tensors(1), [torch.nn.Parameter(tensor) for tensor in tensors(2)]
    expo.extrapolate(sft, aligned, ALPHA, out=aligned)
    monkeypatch.setattr(whole_model.Group, "launch", lambda *_: 1 / 0)
    right = [expected(s, a) for s, a in zip(sft, aligned, strict=True)]
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        expo.extrapolate(sft, aligned, ALPHA, out=aligned)
    assert all_equal(aligned, right)


def test_a_capture_uses_no_table_of_the_cache(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would read the table at each replay, and the cache may have dropped it by then."""
    sft, aligned, outs = tensors(1), tensors(2), tensors(3)
    expo.extrapolate(sft, aligned, ALPHA, out=outs)
    before = len(software.launches)
    monkeypatch.setattr(gpu_fallback, "capturing", lambda _: True)
    expo.extrapolate(sft, aligned, ALPHA, out=outs)
    assert {name for name, _ in software.launches[before:]} == {"extrapolate"}
    assert len(cached()) == 1


def test_lists_that_are_not_one_launch_are_not_kept() -> None:
    """Lists with fp64 or with a tensor that is not contiguous are checked at each call."""
    for odd in (torch.ones(4, 6, dtype=torch.bfloat16).t(), torch.ones(3, dtype=torch.float64)):
        sft, aligned = [*tensors(1), odd], [*tensors(2), odd * 2]
        for _ in range(2):
            right = [expected(s, a) for s, a in zip(sft[:3], aligned[:3], strict=True)]
            expo.extrapolate(sft, aligned, ALPHA, out=aligned)
            assert all_equal(aligned[:3], right)
    assert cached() == []


def test_the_cache_drops_the_table_that_was_not_used_for_the_longest_time(made: list[Any]) -> None:
    lists = [(tensors(i), tensors(i + 1)) for i in range(gpu_calls.MOST_TABLES + 1)]

    def call(i: int) -> None:
        expo.extrapolate(*lists[i], ALPHA, out=lists[i][1])

    for i in range(gpu_calls.MOST_TABLES):
        call(i)
    call(0)  # the first table is the latest one now
    memories = [weakref.ref(table.groups[0].table.untyped_storage()) for table in made]
    made.clear()
    call(gpu_calls.MOST_TABLES)
    assert len(cached()) == gpu_calls.MOST_TABLES
    assert [memory() is None for memory in memories] == [i == 1 for i in range(gpu_calls.MOST_TABLES)]
    made.clear()
    call(0)
    assert made == []
    call(1)
    assert len(made) == 1


def test_threads_share_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than tables use the cache at the same time, and each gets its own result."""
    monkeypatch.setattr(gpu_calls, "MOST_TABLES", 2)
    start, failures = threading.Barrier(4), []

    def use(seed: int) -> None:
        sft, aligned, outs = tensors(seed), tensors(seed + 10), tensors(seed + 20)
        right = [expected(s, a) for s, a in zip(sft, aligned, strict=True)]
        start.wait(30)
        for _ in range(6):
            expo.extrapolate(sft, aligned, ALPHA, out=outs)
            if not all_equal(outs, right):
                failures.append(seed)
            for out in outs:
                out.zero_()

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert len(cached()) <= 2


def test_the_cpus_tensors_have_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tensors, "on_gpu", lambda tensor: tensor.is_cuda)
    assert gpu_calls.make_key(torch, tensors(1), tensors(2), tensors(3)) is None
    assert gpu_calls.make_key(torch, [], [], []) is None


# One tensor


@pytest.mark.parametrize("where", ["out", "in place", "over sft"])
def test_one_plain_tensor_takes_the_short_way(
    where: str, software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo.tensors.arrays._check_tensors", None)  # the full checks must not run
    sft, aligned = (torch.nn.Parameter(torch.randn(30, 7).bfloat16()) for _ in range(2))
    out = {"out": torch.empty(30, 7).bfloat16(), "in place": aligned, "over sft": sft}[where]
    right = expected(sft, aligned)
    assert expo.extrapolate(sft, aligned, ALPHA, out=out) is out
    assert torch.equal(out.detach(), right)
    assert [name for name, _ in software.launches] == ["extrapolate"]


@pytest.mark.parametrize("change", other.values(), ids=other.keys())
@pytest.mark.parametrize("role", range(3))
def test_a_tensor_that_is_not_plain_takes_the_long_way(change: Callable[[Any], Any], role: int) -> None:
    """The short way computes the changed tensors if they fit together, and nothing if they do not."""
    triple = [torch.randn(2000).bfloat16() for _ in range(3)]
    triple[role] = change(triple[role])
    sft, aligned, out = triple
    if gpu_calls.compute_one(torch, sft, aligned, ALPHA, out):
        assert len({sft.shape, aligned.shape, out.shape}) == 1
        assert {type(tensor) for tensor in triple} == {torch.Tensor}
        assert out.dtype == aligned.dtype
        assert torch.equal(out, expected(sft, aligned))
    elif sft.shape == aligned.shape == out.shape and out.dtype == aligned.dtype and 0 not in out.stride():
        right = expected(sft.resolve_neg(), aligned.resolve_neg())
        assert torch.equal(expo.extrapolate(sft, aligned, ALPHA, out=out).resolve_neg(), right)
    else:
        with pytest.raises(expo.UsageError):
            expo.extrapolate(sft, aligned, ALPHA, out=out)


@pytest.mark.parametrize("most", [1 << 46, 1 << 63])
@pytest.mark.parametrize("role", range(3))
def test_one_tensor_whose_memory_was_freed(role: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound saves time alone: addresses below it are compared with the offset, and those of a GPU may be below."""
    monkeypatch.setattr(gpu_calls, "MOST_OFFSET", most)
    triple = [torch.randn(100).bfloat16()[10:] for _ in range(3)]
    assert gpu_calls.compute_one(torch, *triple[:2], ALPHA, triple[2])
    triple[role].untyped_storage().resize_(0)
    assert not gpu_calls.compute_one(torch, *triple[:2], ALPHA, triple[2])


def test_one_tensor_that_overlaps_takes_the_long_way() -> None:
    memory, apart = torch.randn(300).bfloat16(), torch.randn(100).bfloat16()
    for sft, aligned, out in (
        (memory[:100], apart, memory[50:150]),
        (apart, memory[50:150], memory[:100]),
        (memory[:200].view(torch.float32), apart, memory[:100]),
    ):
        assert not gpu_calls.compute_one(torch, sft, aligned, ALPHA, out)
        with pytest.raises(expo.UsageError, match="overlaps"):
            expo.extrapolate(sft, aligned, ALPHA, out=out)
    assert gpu_calls.compute_one(torch, memory[:100], memory[200:], ALPHA, memory[100:200])


def test_one_tensor_that_the_kernel_does_not_compute() -> None:
    empty, double, meta = torch.empty(0).bfloat16(), torch.ones(3).double(), torch.empty(3, device="meta")
    for tensor in (empty, double, meta, torch.ones(3).int()):
        assert not gpu_calls.compute_one(torch, tensor, tensor, ALPHA, torch.empty_like(tensor))
    assert torch.equal(
        expo.extrapolate(double, double * 2, ALPHA, out=double), torch.full((3,), 2.3, dtype=torch.float64)
    )


def test_the_tensors_inside_a_transform_take_the_long_way() -> None:
    """A transform of torch.func puts tensors without memory in the place of the caller's; they are refused."""

    def inside(sft: torch.Tensor, aligned: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(aligned)
        assert not gpu_calls.compute_one(torch, sft, aligned, ALPHA, out)
        assert gpu_calls.make_key(torch, [sft], [aligned], [aligned]) is None
        with pytest.raises(expo.UsageError, match="without memory of its own"):
            expo.extrapolate(sft, aligned, ALPHA, out=out)
        return aligned.sum()

    for transform in (torch.func.vmap, torch.func.grad):
        transform(inside)(torch.ones(5), torch.ones(5))


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_on_another_device_changes_the_current_one(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock alone is the context on the current device; on another one the device is changed and restored."""
    changes: list[Any] = []

    class OnGpu1:
        is_cuda, device = True, torch.device("cuda:1")

        def get_device(self) -> int:
            return 1

    @contextmanager
    def changed(device: Any) -> Iterator[None]:
        changes.append(device)
        yield
        changes.append("restored")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", changed)
    with extrapolate.launching(OnGpu1()):  # type: ignore[arg-type]
        assert changes == ([] if current == 1 else [torch.device("cuda:1")])
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(extrapolate._launches.acquire, blocking=False).result()
    assert changes == ([] if current == 1 else [torch.device("cuda:1"), "restored"])
    with ThreadPoolExecutor(1) as other:
        assert other.submit(extrapolate._launches.acquire, blocking=False).result()
        other.submit(extrapolate._launches.release).result()


# Live


def test_close_releases_the_originals_and_the_tables() -> None:
    models = [torch.nn.Linear(70, 50, dtype=torch.bfloat16) for _ in range(2)]
    held = live.Live(models[1], models[0])
    held.alpha = ALPHA
    (table,) = held._tables.values()
    memories = [weakref.ref(group.table.untyped_storage()) for group in table.groups]
    memories += [weakref.ref(weight.aligned.untyped_storage()) for weight in held._weights]
    del table
    assert None not in [memory() for memory in memories]
    held.close()
    assert [memory() for memory in memories] == [None] * len(memories)
    assert cached() == []
