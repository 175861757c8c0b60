"""How fast are the kernels on a GPU, from its memory to its memory, compared with torch and with a copy?

    python -m pytest --benchmark-only -m gpu

A round enqueues a batch of copies and a batch of a contestant's launches, with CUDA events before, between and after
them, and waits once, at the end. A launch returns before the GPU starts to work, so a clock of the host would time the
launches alone. The seconds between the events are the benchmark's seconds (`gpu_seconds` is its timer). The copies hide
the host's time for the first launch, and every contestant is compared with the copies of the same round. The sets of
inputs are used in turn, and together they exceed the caches.

`bytes_moved` of one launch counts the bytes that the task needs and no others, so the further passes of a rival over
memory count against it; the docstrings of the kernels state the bytes. The result is checked before the timing: the
kernels must have the bits of the definition, and rivals, which round differently, may differ by 2%. A contestant with
another result has no figure.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from bench.pairs import scaled_llama
from expo.dtypes import torch_dtypes
from expo.kernels import numerics
from expo.kernels.contract import Operand, extrapolation, tensor_extrapolation, working_alpha

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
extrapolate = pytest.importorskip("expo.kernels.extrapolate")
sweep = pytest.importorskip("expo.kernels.sweep")
whole_model = pytest.importorskip("expo.kernels.whole_model")

DEVICE = "cuda"
MOST_ELEMENTS = int(os.environ.get("EXPO_BENCH_GPU_ELEMENTS", 256 << 20))  # the most elements of the model in bf16
OTHER_DTYPES_DIVISOR = 4  # models of other dtypes have a quarter of the elements
DEADLINE = float(os.environ.get("EXPO_BENCH_GPU_UNTIL", "inf"))  # no contestant starts after this time.time()
DTYPES = ("BF16", "F16", "F32")
ALPHAS = [working_alpha(alpha) for alpha in (0.3, 0.5, 1.0, -0.7)]
ALPHA = ALPHAS[0]
K = len(ALPHAS)
LEAST_LAUNCHES = 8  # so many make a batch take milliseconds, while an event has an error of about a microsecond
GPU_ROUNDS = 30
MOST_SETS = 64  # tiny models, as tests have, would need thousands of sets to exceed the caches
LEAST_CACHE_BYTES = 256 << 20  # AMD's GPUs have a further cache behind the L2 that torch reports


# Sizes.


class Tensors(NamedTuple):
    """The tensors of a model, one after the other in memory.

    Attributes:
        sft: The elements of sft, [n].
        aligned: The elements of aligned, [n].
        out: The outputs, [K, n].
        lengths: The number of elements of each tensor.
    """

    sft: torch.Tensor
    aligned: torch.Tensor
    out: torch.Tensor
    lengths: list[int]

    def split(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the model in a memory of n elements."""
        return memory.split(self.lengths)


def tensor_lengths(dtype: str) -> list[int]:
    """Return the elements of each tensor of the model: MOST_ELEMENTS together, or as many as fit into the GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # Each element is in two sets of tensors, and rivals allocate up to three more.
    element_bytes = (2 * (2 + K) + 3) * torch_dtypes()[dtype].itemsize
    most = MOST_ELEMENTS if dtype == "BF16" else MOST_ELEMENTS // OTHER_DTYPES_DIVISOR
    return [prod(shape) for shape in scaled_llama(min(most, int(0.8 * free) // element_bytes)).values()]


def make_inputs(dtype: str) -> list[Tensors]:
    """Return at least two sets of tensors, and enough to exceed 4 times the last cache, but at most MOST_SETS."""
    torch.manual_seed(0)
    kind, lengths = torch_dtypes()[dtype], tensor_lengths(dtype)
    cache = max(LEAST_CACHE_BYTES, getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 0))
    sets = []
    enough = -(-4 * cache // (3 * sum(lengths) * kind.itemsize))
    for _ in range(min(max(2, enough), MOST_SETS)):
        aligned = torch.empty(sum(lengths), dtype=kind, device=DEVICE).normal_(std=0.02)
        sft = aligned + torch.empty_like(aligned).normal_(std=0.01)
        sets.append(Tensors(sft, aligned, aligned.new_zeros(K, sum(lengths)), lengths))
    return sets


# Contestants.


class Job(NamedTuple):
    """The work of a contestant on one set of tensors.

    Attributes:
        run: Launches the work and returns the result.
        bytes_moved: The bytes that the task needs to move.
    """

    run: Callable[[], torch.Tensor]
    bytes_moved: int


Contestant = Callable[[Tensors], Job]


def _make_job(t: Tensors, launch: Callable[[], object], extra_bytes: int = 0) -> Job:
    """Return a job that writes the first output: two reads and a write of every element, and the extra bytes."""

    def run() -> torch.Tensor:
        launch()
        return t.out[0]

    return Job(run, 3 * t.aligned.nbytes + extra_bytes)


def copy(t: Tensors) -> Job:
    """Copy aligned."""
    return Job(lambda: t.out[0].copy_(t.aligned), 2 * t.aligned.nbytes)


def plain(t: Tensors) -> Job:
    """Merge with one alpha, in one launch."""
    return _make_job(t, lambda: extrapolate.launch(*tensor_extrapolation(t.sft, t.aligned, (ALPHA,)), [t.out[0]]))


def sweep_of_4(t: Tensors, measure: bool = False) -> Job:
    """Merge with four alphas, in one launch."""
    alphas = torch.tensor(ALPHAS, dtype=torch.float32, device=DEVICE)
    partials = sweep.Partials.empty(t.aligned.numel(), K, t.aligned.device) if measure else None
    extra_bytes = sum(each.nbytes for each in partials or ())

    def run() -> torch.Tensor:
        sweep.launch(*tensor_extrapolation(t.sft, t.aligned, alphas), t.out, partials)
        return t.out

    return Job(run, (2 + K) * t.aligned.nbytes + extra_bytes)


def sweep_of_4_with_statistics(t: Tensors) -> Job:
    """Merge with four alphas and measure, in one launch."""
    return sweep_of_4(t, measure=True)


def whole_model_in_place(t: Tensors) -> Job:
    """Merge all tensors in one launch, in place, over the copies of aligned in the first output."""
    outputs = t.split(t.out[0])
    table = whole_model.Table(t.split(t.sft), outputs, outputs)
    rows = sum(-(-n // (whole_model.SEGMENT * extrapolate.PROGRAM_ELEMENTS)) for n in t.lengths)
    return _make_job(t, lambda: table.launch(ALPHA), 32 * rows)


def papers_expression(t: Tensors) -> Job:
    """Compute the paper's expression in torch."""
    return Job(lambda: t.aligned + ALPHA * (t.aligned - t.sft), 3 * t.aligned.nbytes)


def torch_lerp(t: Tensors) -> Job:
    """Merge with torch.lerp."""
    return _make_job(t, lambda: torch.lerp(t.sft, t.aligned, 1 + ALPHA, out=t.out[0]))


def torch_foreach_lerp_in_place(t: Tensors) -> Job:
    """Merge all tensors in place, over the copies of aligned in the first output: a + (-alpha) * (s - a)."""
    outputs, sft = t.split(t.out[0]), t.split(t.sft)
    return _make_job(t, lambda: torch._foreach_lerp_(outputs, sft, -ALPHA))


def _formula(s: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    wide = a.float()
    out.copy_(wide + ALPHA * (wide - s.float()))


def torch_compiled(t: Tensors) -> Job:
    """Compile the expression in fp32, rounded once, with torch.compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler gives advice and uses deprecated functions
        compiled = torch.compile(_formula, dynamic=False)
        compiled(t.sft, t.aligned, t.out[0])
    return _make_job(t, lambda: compiled(t.sft, t.aligned, t.out[0]))


KERNELS = (plain, sweep_of_4, sweep_of_4_with_statistics, whole_model_in_place)
RIVALS = (papers_expression, torch_lerp, torch_foreach_lerp_in_place, torch_compiled)


# Timing.


class Clock:
    """The clock counts the seconds of the GPU that have been timed so far."""

    seconds = 0.0


def gpu_seconds() -> float:
    """Return the seconds timed so far; pytest-benchmark takes them as its timer, so a round has its events' seconds."""
    return Clock.seconds


def run_round(copies: Sequence[Job], jobs: Sequence[Job], copy_seconds: list[float]) -> None:
    """Time a batch of copies and a batch of a contestant's launches.

    The mean seconds of a copy are appended to `copy_seconds`, and those of a launch are added to the clock.
    """
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    launches = max(LEAST_LAUNCHES, len(jobs))
    copies[-1].run()  # while the GPU works on it, the host enqueues the first event and the launches after it
    start.record()
    for i in range(launches):
        copies[i % len(copies)].run()
    middle.record()
    for i in range(launches):
        jobs[i % len(jobs)].run()
    end.record()
    end.synchronize()
    copy_seconds.append(start.elapsed_time(middle) / 1e3 / launches)
    Clock.seconds += middle.elapsed_time(end) / 1e3 / launches


def driver_version() -> str:
    """Return the version of the GPU's driver, or "unknown"."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text().strip() if amd.exists() else "unknown"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees no CUDA device")
@pytest.mark.benchmark(timer=gpu_seconds)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contestant", [copy, *KERNELS, *RIVALS], ids=lambda f: f.__name__)
def test_gpu(benchmark: Any, contestant: Contestant, dtype: str) -> None:
    """Time a launch on the GPU; extra_info["of_roof"] is its GB/s divided by a copy's, the median of the rounds."""
    if time.time() > DEADLINE:
        pytest.skip("no time was left")
    sets = make_inputs(dtype)
    jobs, copies = [contestant(t) for t in sets], [copy(t) for t in sets]
    copy_seconds: list[float] = []
    for job in (*copies, *jobs):
        job.run()  # the first run compiles and loads
    torch.cuda.synchronize()
    _check(contestant, dtype, sets[0], jobs[0])
    benchmark.group = f"on a GPU, {dtype}, {sets[0].aligned.numel()} elements"
    try:
        benchmark.pedantic(run_round, args=(copies, jobs, copy_seconds), rounds=GPU_ROUNDS, warmup_rounds=5)
    except BaseException:  # after an interrupt pytest-benchmark has too few rounds, and would write no JSON at all
        benchmark.has_error = True
        raise
    rates = [jobs[0].bytes_moved / seconds for seconds in benchmark.stats.stats.data]
    copy_rates = [copies[0].bytes_moved / seconds for seconds in copy_seconds[-len(rates) :]]
    benchmark.extra_info.update(
        elements=sets[0].aligned.numel(),
        sets=len(sets),
        bytes_moved=jobs[0].bytes_moved,
        gb_per_s=round(statistics.median(rates) / 1e9, 1),
        roof_gb_per_s=round(statistics.median(copy_rates) / 1e9, 1),
        of_roof=round(statistics.median(rate / top for rate, top in zip(rates, copy_rates, strict=True)), 3),
        device=torch.cuda.get_device_name(DEVICE),
        driver=driver_version(),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def _check(contestant: Contestant, dtype: str, t: Tensors, job: Job) -> None:
    """Compare every element of the result with the definition; the first output is a copy of aligned before the run."""
    t.out.fill_(7.0)
    t.out[0].copy_(t.aligned)
    result = job.run().view(-1, t.aligned.numel())
    s, a = (_memory(tensor) for tensor in (t.sft, t.aligned))
    for row, alpha in zip(result, ALPHAS, strict=False):
        expected = torch.empty_like(row, device="cpu")
        arguments = extrapolation(Operand(s, dtype), Operand(a, dtype), (alpha,))
        numerics.extrapolate(*arguments, (_memory(expected),), False)
        if contestant is copy:
            assert torch.equal(row, t.aligned)
        elif contestant in KERNELS:
            assert np.array_equal(_memory(row), _memory(expected))
        else:
            torch.testing.assert_close(row.cpu(), expected, rtol=0.02, atol=1e-3)


def _memory(tensor: torch.Tensor) -> Any:
    """Return a tensor's bytes, on the host."""
    return tensor.view(torch.uint8).cpu().numpy()
