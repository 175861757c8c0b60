"""These tests run the Triton kernels on a GPU; the bits must be those of the numerics contract on the host.

Other tests interpret and read the compiled code; these run it. They need a device that torch calls CUDA, which includes
AMD's GPUs. Without one they are all skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch
from engine_calls import run_engine
from same import assert_same

import expo
from expo.demo import ALIGNED, SFT
from expo.dtypes import torch_dtypes
from expo.kernels import numerics
from expo.kernels.contract import Statistics, tensor_extrapolation, working_alpha

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)
pytest.importorskip("triton", reason="Triton has no build for this platform")
extrapolate = pytest.importorskip("expo.kernels.extrapolate")
sweep = pytest.importorskip("expo.kernels.sweep")
whole_model = pytest.importorskip("expo.kernels.whole_model")
selftest = pytest.importorskip("expo.kernels.selftest")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees no CUDA device"),
]

DEVICE = "cuda"
NARROW = ("BF16", "F16", "F32")
PAIRS = list(product(NARROW, NARROW))  # (sft, aligned)
ALL_PAIRS = list(product(torch_dtypes(), torch_dtypes()))
ALPHAS = (0.3, 0.5, 1.0, -0.7, 2.5, 25.0, 1e-30, 3e38)
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
POISON, GUARD = 0xA5, 64  # the byte that fills outputs; the number of elements beside an output that must keep it
BLOCKS = (extrapolate.PROGRAM_ELEMENTS, sweep.PROGRAM_ELEMENTS)
AROUND_BLOCKS = sorted({n for block in BLOCKS for n in (*range(block - 9, block + 10), 2 * block - 1, 2 * block + 1)})
LENGTHS = (*range(26), *AROUND_BLOCKS)

Array = Any  # the bits of elements, as unsigned integers


# Each kernel has one function: it prepares a launch for outs of shape (alphas, n) and returns the launch as a function

Launch = Callable[[], None]


def plain(s: torch.Tensor, a: torch.Tensor, alphas: Sequence[float], outs: torch.Tensor) -> Launch:
    def launch() -> None:
        for alpha, out in zip(alphas, outs, strict=True):
            extrapolate.launch(*tensor_extrapolation(s, a, (working_alpha(alpha),)), [out])

    return launch


def swept(
    s: torch.Tensor, a: torch.Tensor, alphas: Sequence[float], outs: torch.Tensor, partials: Any = None
) -> Launch:
    on_gpu = torch.tensor(alphas, dtype=torch.float32, device=s.device)
    return lambda: sweep.launch(*tensor_extrapolation(s, a, on_gpu), outs, partials)


def measured(s: torch.Tensor, a: torch.Tensor, alphas: Sequence[float], outs: torch.Tensor) -> Launch:
    return swept(s, a, alphas, outs, sweep.Partials.empty(a.numel(), len(alphas), a.device))


def whole(s: torch.Tensor, a: torch.Tensor, alphas: Sequence[float], outs: torch.Tensor) -> Launch:
    tables = [whole_model.Table([s], [a], [out]) for out in outs]

    def launch() -> None:
        for alpha, table in zip(alphas, tables, strict=True):
            table.launch(working_alpha(alpha))

    return launch


Kernel = Callable[[torch.Tensor, torch.Tensor, Sequence[float], torch.Tensor], Launch]
every_kernel = pytest.mark.parametrize("kernel", [plain, swept, measured, whole], ids=lambda f: f.__name__)
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def random_bits(seed: int, pair: tuple[str, str], n: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, np.iinfo(BITS[dtype]).max, n, BITS[dtype], endpoint=True) for dtype in pair]


def weights(pair: tuple[str, str], n: int) -> list[Array]:
    """Return bits of weights like a model's; some elements are equal, and some are infinite or NaN."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal(n) * 0.02
    s = a + rng.standard_normal(n) * 0.0005
    s[::5] = a[::5]
    a[7::50], s[9::60] = np.inf, np.nan
    return [
        bits_of(torch.from_numpy(x).to(torch_dtypes()[dtype]), dtype) for x, dtype in zip((s, a), pair, strict=True)
    ]


def reference(
    s: Array, a: Array, pair: tuple[str, str], alphas: Sequence[float], measure: bool = False
) -> tuple[list[Array], Statistics | None]:
    outs = [np.empty_like(a) for _ in alphas]
    working = [working_alpha(alpha, *pair) for alpha in alphas]
    return outs, run_engine(numerics.extrapolate, s, a, pair, outs, working, measure)


def upload(bits: Array, dtype: str, shift: int = 0, device: str | None = None) -> torch.Tensor:
    """Return the elements on the GPU, in a tensor that starts `shift` elements past an address of the allocator."""
    tensor = torch.empty(bits.size + shift, dtype=torch_dtypes()[dtype], device=device or DEVICE)[shift:]
    tensor.view(torch.uint8).copy_(torch.from_numpy(bits.view(np.uint8)))
    return tensor


def bits_of(tensor: torch.Tensor, dtype: str) -> Array:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().view(BITS[dtype])


def launched(
    kernel: Kernel, s: Array, a: Array, pair: tuple[str, str], alphas: Sequence[float], shift: int = 0
) -> list[Array]:
    """Return the bits of each output, and assert that the kernel wrote nothing beside the outputs."""
    sft, aligned = upload(s, pair[0], shift), upload(a, pair[1], shift)
    pitch, start = -(-a.size // 16) * 16 + GUARD + shift, GUARD + shift
    size = (2 * GUARD + len(alphas) * pitch) * a.itemsize
    memory = torch.full((size,), POISON, dtype=torch.uint8, device=DEVICE).view(torch_dtypes()[pair[1]])
    kernel(sft, aligned, alphas, memory.as_strided((len(alphas), a.size), (pitch, 1), start))()
    after = bits_of(memory, pair[1])
    rows = [after[start + k * pitch :][: a.size] for k in range(len(alphas))]
    outs = [row.copy() for row in rows]
    for row in rows:
        row.view(np.uint8)[:] = POISON
    assert (after.view(np.uint8) == POISON).all(), "written beside an output"
    assert np.array_equal(bits_of(sft, pair[0]), s)
    assert np.array_equal(bits_of(aligned, pair[1]), a)
    return outs


def assert_right(
    kernel: Kernel, s: Array, a: Array, pair: tuple[str, str], alphas: Sequence[float], shift: int = 0
) -> None:
    expected, _ = reference(s, a, pair, alphas)
    for out, right in zip(launched(kernel, s, a, pair, alphas, shift), expected, strict=True):
        assert_same(out, right, pair[1])


def room_for(size: int) -> None:
    """Skip the test if the GPU has less free memory than `size` bytes and a tenth more."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size * 1.1:
        pytest.skip(f"needs {size * 1.1 / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} are free")


# Values, lengths and addresses


@every_pair
@every_kernel
def test_special_values(kernel: Kernel, pair: tuple[str, str]) -> None:
    """Every kernel gives the right bits for every combination of the two dtypes' special values."""
    crossed = product(exact.specials(pair[0]), exact.specials(pair[1]))
    s, a = (np.array(bits, BITS[dtype]) for bits, dtype in zip(zip(*crossed, strict=True), pair, strict=True))
    assert_right(kernel, s, a, pair, ALPHAS)


@every_pair
@every_kernel
def test_random_bits(kernel: Kernel, pair: tuple[str, str]) -> None:
    """Every kernel gives the right bits for random bit patterns, over several rows of the whole model's table."""
    s, a = random_bits(1, pair, 2 * whole_model.SEGMENT * extrapolate.PROGRAM_ELEMENTS + 13)
    assert_right(kernel, s, a, pair, (0.3, 1.0, -0.7))


@pytest.mark.parametrize("shift", [0, 1, 8])
@every_pair
@every_kernel
def test_lengths(kernel: Kernel, pair: tuple[str, str], shift: int) -> None:
    """Lengths around the tail of 8 lanes and around blocks are right, at an aligned address and past it."""
    for n in LENGTHS:
        s, a = random_bits(n, pair, n)
        assert_right(kernel, s, a, pair, (0.3, -0.7), shift)


@pytest.mark.parametrize("shift", [0, 1])
@every_pair
@every_kernel
def test_in_place(kernel: Kernel, pair: tuple[str, str], shift: int) -> None:
    """The output may be aligned's memory, or sft's if the dtypes are equal."""
    s, a = random_bits(2, pair, 3 * sweep.PROGRAM_ELEMENTS + 13)
    (expected,), _ = reference(s, a, pair, (0.3,))
    for place in (0, 1) if pair[0] == pair[1] else (1,):
        tensors = upload(s, pair[0], shift), upload(a, pair[1], shift)
        kernel(*tensors, (0.3,), tensors[place].unsqueeze(0))()
        assert_same(bits_of(tensors[place], pair[1]), expected, pair[1])


@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-".join)
def test_public_function(pair: tuple[str, str]) -> None:
    """`expo.extrapolate` gives the CPU's bits on the GPU too, also for fp64 and for tensors that are not contiguous."""
    s, a = random_bits(4, pair, 61 * 67)
    expected, _ = reference(s, a, pair, (0.3,))
    sft, aligned = (upload(x, dtype).view(61, 67) for x, dtype in zip((s, a), pair, strict=True))
    assert_same(bits_of(expo.extrapolate(sft, aligned, 0.3), pair[1]), expected[0], pair[1])
    turned = expo.extrapolate(sft.T, aligned.T, 0.3)
    assert turned.device == aligned.device
    assert_same(bits_of(turned.T, pair[1]), expected[0], pair[1])
    assert expo.extrapolate(sft, aligned, 0.3, out=aligned) is aligned
    assert_same(bits_of(aligned, pair[1]), expected[0], pair[1])


# Statistics


@pytest.mark.parametrize("n", [1, 1000, sweep.PROGRAM_ELEMENTS, 3 * sweep.PROGRAM_ELEMENTS + 2055, 1 << 20])
@every_pair
def test_statistics(pair: tuple[str, str], n: int) -> None:
    """The statistics agree with the definition's, and a second launch gives the same bits."""
    alphas = (0.3, 1.0, -0.7)
    s, a = weights(pair, n)
    _, expected = reference(s, a, pair, alphas, measure=True)
    sft, aligned = upload(s, pair[0]), upload(a, pair[1])
    runs = []
    for garbage in (-1, 77):
        partials = sweep.Partials.empty(n, len(alphas), aligned.device)
        for each in partials:
            each.fill_(garbage)
        swept(sft, aligned, alphas, aligned.new_empty(len(alphas), n), partials)()
        runs.append(sweep.Partials(*(each.cpu() for each in partials)))
    assert torch.equal(runs[0].sums, runs[1].sums)
    assert torch.equal(runs[0].counts, runs[1].counts)
    found = sweep.statistics(runs[0])
    assert expected is not None
    assert found.counts == expected.counts
    assert found.max_abs_d == expected.max_abs_d
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5, abs=0)


# Whole models


class Small(torch.nn.Module):
    """A model with tied weights of several rows of the table, odd lengths, an odd address and three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(20011, 17, dtype=torch.bfloat16)
        self.norm = torch.nn.LayerNorm(17)
        self.inner = torch.nn.Linear(17, 31, dtype=torch.float16)
        self.odd = torch.nn.Parameter(torch.randn(100, dtype=torch.bfloat16)[1:])
        self.head = torch.nn.Linear(17, 20011, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight


def by_table(sft: list[torch.Tensor], model: list[torch.Tensor]) -> Callable[[float], None]:
    table = whole_model.Table(sft, model, model)
    return lambda alpha: table.launch(working_alpha(alpha))


def by_public_function(sft: list[torch.Tensor], model: list[torch.Tensor]) -> Callable[[float], None]:
    return lambda alpha: expo.extrapolate(sft, model, alpha, out=model) and None


@pytest.mark.parametrize("prepare", [by_table, by_public_function], ids=lambda f: f.__name__)
def test_model_in_place(prepare: Callable[..., Callable[[float], None]]) -> None:
    """A model is rewritten in place twice; the second launch starts from the first one's result.

    One of sft's tensors has another dtype than aligned's.
    """
    torch.manual_seed(0)
    with torch.device(DEVICE):
        sft, model = Small(), Small()
    sft.inner.float()
    theirs, ours = list(sft.parameters()), list(model.parameters())
    assert len(ours) == 6  # the tied weights once
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    pairs = [(names[s.dtype], names[a.dtype]) for s, a in zip(theirs, ours, strict=True)]
    weak = [bits_of(s, dtype) for s, (dtype, _) in zip(theirs, pairs, strict=True)]
    expected = [bits_of(a, dtype) for a, (_, dtype) in zip(ours, pairs, strict=True)]
    launch = prepare(theirs, ours)
    for alpha in (0.3, -0.7):
        expected = [reference(s, a, pair, (alpha,))[0][0] for s, a, pair in zip(weak, expected, pairs, strict=True)]
        launch(alpha)
        for tensor, right, (_, dtype) in zip(ours, expected, pairs, strict=True):
            assert_same(bits_of(tensor, dtype), right, dtype)
    assert model.head.weight is model.embedding.weight
    for tensor, before, (dtype, _) in zip(theirs, weak, pairs, strict=True):
        assert np.array_equal(bits_of(tensor, dtype), before)


# Sizes that 32 bits do not hold


@every_kernel
def test_more_than_two_to_the_31_elements(kernel: Kernel) -> None:
    """The bits are right at the start, on both sides of element 2^31, and at the end."""
    pair, n, side = ("BF16", "BF16"), 2**31 + 3 * sweep.PROGRAM_ELEMENTS + 5, 2 * sweep.PROGRAM_ELEMENTS
    room_for(3 * 2 * n)
    s, a, out = (torch.empty(n, dtype=torch.int16, device=DEVICE) for _ in range(3))
    for memory in (s, a, out):
        memory.random_(-(2**15), 2**15)
    s, a, out = (memory.view(torch.bfloat16) for memory in (s, a, out))
    kernel(s, a, (0.3,), out.unsqueeze(0))()
    for window in (slice(0, side), slice(2**31 - side, 2**31 + side), slice(n - side, n)):
        (expected,), _ = reference(bits_of(s[window], "BF16"), bits_of(a[window], "BF16"), pair, (0.3,))
        assert_same(bits_of(out[window], "BF16"), expected, "BF16")


@pytest.mark.parametrize("kernel", [swept, measured], ids=lambda f: f.__name__)
def test_outputs_more_than_two_to_the_31_elements_apart(kernel: Kernel) -> None:
    """The bits are right if the pitch fits into 32 bits, but the offset of the last output does not."""
    pair, n, pitch, alphas = ("BF16", "BF16"), sweep.PROGRAM_ELEMENTS + 77, 2**30, (0.3, 1.0, -0.7)
    room_for(2 * (2 * pitch + n))
    s, a = random_bits(5, pair, n)
    expected, _ = reference(s, a, pair, alphas)
    memory = torch.empty(2 * pitch + n, dtype=torch.bfloat16, device=DEVICE)
    outs = memory.as_strided((3, n), (pitch, 1))
    kernel(upload(s, "BF16"), upload(a, "BF16"), alphas, outs)()
    for out, right in zip(outs, expected, strict=True):
        assert_same(bits_of(out, "BF16"), right, "BF16")


# The self-test


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the device, without a record that its kernels have passed their test, as in a new process."""
    monkeypatch.setattr(selftest, "_passed", set())
    return torch.empty(0, device=DEVICE).device


def test_the_kernels_pass_their_test(untested: torch.device) -> None:
    selftest.check(untested)
    assert selftest._passed == {untested}


@pytest.mark.parametrize("tested", [False, True])
def test_capture(untested: torch.device, tested: bool) -> None:
    """A graph gives the definition's bits, whether it captured torch's operations or the launch of a tested kernel."""
    s, a = random_bits(8, ("BF16", "BF16"), 5000)
    (expected,), _ = reference(s, a, ("BF16", "BF16"), (0.3,))
    sft, aligned = upload(s, "BF16"), upload(a, "BF16")
    out = torch.zeros_like(aligned)
    if tested:
        expo.extrapolate(sft, aligned, 0.3, out=out)
    torch.cuda.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expo.extrapolate(sft, aligned, 0.3, out=out)
    assert selftest._passed == ({untested} if tested else set())
    graph.replay()
    assert_same(bits_of(out, "BF16"), expected, "BF16")


# Devices and streams


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@every_kernel
def test_a_device_that_is_not_the_current_one(kernel: Kernel) -> None:
    pair, alphas = ("BF16", "F16"), (0.3, -0.7)
    s, a = random_bits(6, pair, sweep.PROGRAM_ELEMENTS + 13)
    expected, _ = reference(s, a, pair, alphas)
    sft, aligned = upload(s, pair[0], device="cuda:1"), upload(a, pair[1], device="cuda:1")
    outs = aligned.new_empty(len(alphas), a.size)
    with torch.cuda.device(0):
        kernel(sft, aligned, alphas, outs)()
        assert torch.cuda.current_device() == 0
    for out, right in zip(outs, expected, strict=True):
        assert_same(bits_of(out, pair[1]), right, pair[1])


@every_kernel
def test_a_launch_keeps_its_place_in_the_current_stream(kernel: Kernel) -> None:
    """A launch waits for inputs that arrive late on its stream; on another stream it would read the old values."""
    pair, alphas = ("BF16", "BF16"), (0.3, -0.7)
    s, a = random_bits(7, pair, 3 * sweep.PROGRAM_ELEMENTS + 13)
    expected, _ = reference(s, a, pair, alphas)
    right_s, right_a = upload(s, "BF16"), upload(a, "BF16")
    late_s, late_a = torch.zeros_like(right_s), torch.ones_like(right_a)
    outs = late_a.new_empty(len(alphas), a.size)
    launch = kernel(late_s, late_a, alphas, outs)
    launch()  # the first launch compiles, which would take longer than the wait below
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: 0.1 s or so
        late_s.copy_(right_s)
        late_a.copy_(right_a)
        launch()
        copied = outs.clone()
    assert not stream.query(), "the inputs arrived before the launch: this showed nothing"
    stream.synchronize()
    for out, right in zip(copied, expected, strict=True):
        assert_same(bits_of(out, "BF16"), right, "BF16")


# Merges from file to file


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@pytest.mark.parametrize("crew", [{"engine": "triton"}, {"device": "cuda"}], ids=str)
def test_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew: dict[str, str], engine: str) -> None:
    """A merge of the demo pair, in more chunks than the ring has slots, gives the CPU's files and figures."""
    if engine == "cpu":
        pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 64 << 10)
    monkeypatch.setattr("expo.execution.gpu_lane.LEAST_GPU_BYTES", 1)  # byte, below which the GPU is not asked
    merged = expo.merge(SFT, ALIGNED, (0.3, -0.7), tmp_path / "gpu-{alpha}", verify=True, **crew)
    expected = expo.merge(SFT, ALIGNED, (0.3, -0.7), tmp_path / "cpu-{alpha}", engine=engine)
    for ours, theirs in zip(merged.outputs, expected.outputs, strict=True):
        assert (ours.changed, ours.non_finite) == (theirs.changed, theirs.non_finite)
        found, right = ({f.name: f.read_bytes() for f in Path(each.path).iterdir()} for each in (ours, theirs))
        assert found.keys() == right.keys()
        assert [name for name in found if found[name] != right[name]] == []
    assert merged.engine == "triton"
    assert [note for note in merged.warnings if "same bits" in note] == [], "the GPU failed, and the CPU took over"
    if "engine" in crew:  # otherwise the CPU helps, and may have finished before the GPU starts
        assert merged.shares.keys() == {"triton"}
    assert merged.max_abs_difference == expected.max_abs_difference
    assert merged.relative_distance == pytest.approx(expected.relative_distance, rel=1e-5)
