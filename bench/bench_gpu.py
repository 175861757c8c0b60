"""The kernels on a GPU, from its memory to its memory: ours, what is written with torch today, and a copy as the roof.

    python -m pytest --benchmark-only -m gpu

A round enqueues a batch of copies and a batch of a contestant's launches, with CUDA events before, between and after,
and waits once, at the end. A launch returns before the GPU has begun, so a clock of the host would time the launching;
the events' seconds are the benchmark's own (`gpu_seconds` is its timer). The copies hide the host's time for the first
launch, and are the roof that the same round is compared with. Inputs rotate past the caches.

bytes_moved, of one launch: what the task needs and no more, for rivals too, so that their further passes over memory
count against them; ours as the kernels' docstrings state. The result is checked before the timing, against the
definition: ours to the bit, rivals, which round otherwise, to 2%. A contestant with another result has no figure.
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
from expo.kernels import numerics
from expo.kernels.contract import Operand, extrapolation, tensor_extrapolation, working_alpha

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
extrapolate = pytest.importorskip("expo.kernels.extrapolate")
sweep = pytest.importorskip("expo.kernels.sweep")
whole_model = pytest.importorskip("expo.kernels.whole_model")

DEVICE = "cuda"
MOST = int(os.environ.get("EXPO_BENCH_GPU_ELEMENTS", 256 << 20))  # of a tensor, in bf16; a quarter of it elsewhere
UNTIL = float(os.environ.get("EXPO_BENCH_GPU_UNTIL", "inf"))  # of time.time(): no contestant begins after it
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ALPHAS = [working_alpha(alpha) for alpha in (0.3, 0.5, 1.0, -0.7)]
ALPHA = ALPHAS[0]
K = len(ALPHAS)
LAUNCHES = 8  # of a batch, at least: a few milliseconds, against the microsecond or so that an event is off
ROUNDS = 30
CACHE = 256 << 20  # bytes, at least: what torch calls the L2 is not the last cache on AMD's GPUs


# Sizes


class Tensors(NamedTuple):
    """sft and aligned of n elements, out of K rows of them; cut: the elements of each tensor of a model, in a row."""

    sft: torch.Tensor
    aligned: torch.Tensor
    out: torch.Tensor
    cut: list[int]

    def model(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return memory.split(self.cut)


def lengths(dtype: str) -> list[int]:
    """The elements of each tensor of the model: MOST together, or as many as the GPU has room for."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    element = (2 * (2 + K) + 3) * DTYPES[dtype].itemsize  # bytes, in two sets and in what the rivals allocate
    most = MOST if dtype == "BF16" else MOST // 4
    return [prod(shape) for shape in scaled_llama(min(most, int(0.8 * free) // element)).values()]


def inputs(dtype: str) -> list[Tensors]:
    """Two sets, or as many as are past 4 times the last cache."""
    torch.manual_seed(0)
    kind, cut = DTYPES[dtype], lengths(dtype)
    cache = max(CACHE, getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 0))
    sets = []
    for _ in range(max(2, -(-4 * cache // (3 * sum(cut) * kind.itemsize)))):
        aligned = torch.empty(sum(cut), dtype=kind, device=DEVICE).normal_(std=0.02)
        sft = aligned + torch.empty_like(aligned).normal_(std=0.01)
        sets.append(Tensors(sft, aligned, aligned.new_zeros(K, sum(cut)), cut))
    return sets


# Contestants: for one set of tensors, what launches the work and gives the result, and the bytes that it has to move


class Job(NamedTuple):
    run: Callable[[], torch.Tensor]
    bytes_moved: int


Contestant = Callable[[Tensors], Job]


def _merged(t: Tensors, launch: Callable[[], object], extra: int = 0) -> Job:
    """A job that writes out's first row: two reads and a write of every element, and `extra` bytes."""

    def run() -> torch.Tensor:
        launch()
        return t.out[0]

    return Job(run, 3 * t.aligned.nbytes + extra)


def copy(t: Tensors) -> Job:
    return Job(lambda: t.out[0].copy_(t.aligned), 2 * t.aligned.nbytes)


def plain(t: Tensors) -> Job:
    return _merged(t, lambda: extrapolate.launch(*tensor_extrapolation(t.sft, t.aligned, (ALPHA,)), [t.out[0]]))


def sweep_of_4(t: Tensors, measure: bool = False) -> Job:
    alphas = torch.tensor(ALPHAS, dtype=torch.float32, device=DEVICE)
    partials = sweep.Partials.empty(t.aligned.numel(), K, t.aligned.device) if measure else None
    extra = sum(each.nbytes for each in partials or ())

    def run() -> torch.Tensor:
        sweep.launch(*tensor_extrapolation(t.sft, t.aligned, alphas), t.out, partials)
        return t.out

    return Job(run, (2 + K) * t.aligned.nbytes + extra)


def sweep_of_4_with_statistics(t: Tensors) -> Job:
    return sweep_of_4(t, measure=True)


def whole_model_in_place(t: Tensors) -> Job:
    """All tensors in one launch, over what the copies have put into out's first row."""
    ours = t.model(t.out[0])
    table = whole_model.Table(t.model(t.sft), ours, ours)
    rows = sum(-(-n // (whole_model.SEGMENT * extrapolate.BLOCK)) for n in t.cut)
    return _merged(t, lambda: table.launch(ALPHA), 32 * rows)


def papers_expression(t: Tensors) -> Job:
    return Job(lambda: t.aligned + ALPHA * (t.aligned - t.sft), 3 * t.aligned.nbytes)


def torch_lerp(t: Tensors) -> Job:
    return _merged(t, lambda: torch.lerp(t.sft, t.aligned, 1 + ALPHA, out=t.out[0]))


def torch_foreach_lerp_in_place(t: Tensors) -> Job:
    """All tensors, over what the copies have put into out's first row: a + (-alpha) * (s - a)."""
    ours, sft = t.model(t.out[0]), t.model(t.sft)
    return _merged(t, lambda: torch._foreach_lerp_(ours, sft, -ALPHA))


def _formula(s: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    wide = a.float()
    out.copy_(wide + ALPHA * (wide - s.float()))


def torch_compiled(t: Tensors) -> Job:
    """The expression in fp32, rounded once; compiled here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's advice, and what it uses that is deprecated
        compiled = torch.compile(_formula, dynamic=False)
        compiled(t.sft, t.aligned, t.out[0])
    return _merged(t, lambda: compiled(t.sft, t.aligned, t.out[0]))


OURS = (plain, sweep_of_4, sweep_of_4_with_statistics, whole_model_in_place)
RIVALS = (papers_expression, torch_lerp, torch_foreach_lerp_in_place, torch_compiled)


# Timing


class Clock:
    """What has been timed up to now, in seconds of the GPU."""

    seconds = 0.0


def gpu_seconds() -> float:
    """pytest-benchmark's timer: what the events of a round add is the round's time."""
    return Clock.seconds


def one_round(roofs: Sequence[Job], jobs: Sequence[Job], roof: list[float]) -> None:
    """Time a launch of a job, on the clock, and of a copy, at the end of `roof`: means of a batch in seconds."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    launches = max(LAUNCHES, len(jobs))
    roofs[-1].run()  # at work before the first event, the GPU need not wait for the host at it
    start.record()
    for i in range(launches):
        roofs[i % len(roofs)].run()
    middle.record()
    for i in range(launches):
        jobs[i % len(jobs)].run()
    end.record()
    end.synchronize()
    roof.append(start.elapsed_time(middle) / 1e3 / launches)
    Clock.seconds += middle.elapsed_time(end) / 1e3 / launches


def driver() -> str:
    """The version of the GPU's driver, where the system tells."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text().strip() if amd.exists() else "unknown"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees no CUDA device")
@pytest.mark.benchmark(timer=gpu_seconds)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contestant", [copy, *OURS, *RIVALS], ids=lambda f: f.__name__)
def test_gpu(benchmark: Any, contestant: Contestant, dtype: str) -> None:
    """A launch's seconds on the GPU; extra_info["of_roof"]: GB/s over a copy's, median of the pairs in a round."""
    if time.time() > UNTIL:
        pytest.skip("no time was left")
    sets = inputs(dtype)
    jobs, roofs = [contestant(t) for t in sets], [copy(t) for t in sets]
    roof: list[float] = []
    for job in (*roofs, *jobs):
        job.run()  # compiles and loads
    torch.cuda.synchronize()
    _check(contestant, dtype, sets[0], jobs[0])
    benchmark.group = f"on a GPU, {dtype}, {sets[0].aligned.numel()} elements"
    try:
        benchmark.pedantic(one_round, args=(roofs, jobs, roof), rounds=ROUNDS, warmup_rounds=5)
    except BaseException:  # of an interrupt, which would leave rounds that pytest-benchmark cannot sum up, and no JSON
        benchmark.has_error = True
        raise
    moved = [jobs[0].bytes_moved / seconds for seconds in benchmark.stats.stats.data]
    copied = [roofs[0].bytes_moved / seconds for seconds in roof[-len(moved) :]]
    benchmark.extra_info.update(
        elements=sets[0].aligned.numel(),
        sets=len(sets),
        bytes_moved=jobs[0].bytes_moved,
        gb_per_s=round(statistics.median(moved) / 1e9, 1),
        roof_gb_per_s=round(statistics.median(copied) / 1e9, 1),
        of_roof=round(statistics.median(ours / top for ours, top in zip(moved, copied, strict=True)), 3),
        device=torch.cuda.get_device_name(DEVICE),
        driver=driver(),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def _check(contestant: Contestant, dtype: str, t: Tensors, job: Job) -> None:
    """Every element of the job's result, from a fresh copy of aligned where it works in place."""
    t.out.fill_(7.0)
    t.out[0].copy_(t.aligned)
    result = job.run().view(-1, t.aligned.numel())
    s, a = (_memory(tensor) for tensor in (t.sft, t.aligned))
    for row, alpha in zip(result, ALPHAS, strict=False):
        truth = torch.empty_like(row, device="cpu")
        arguments = extrapolation(Operand(s, dtype), Operand(a, dtype), (alpha,))
        numerics.extrapolate(*arguments, (_memory(truth),), False)
        if contestant is copy:
            assert torch.equal(row, t.aligned)
        elif contestant in OURS:
            assert np.array_equal(_memory(row), _memory(truth))
        else:
            torch.testing.assert_close(row.cpu(), truth, rtol=0.02, atol=1e-3)


def _memory(tensor: torch.Tensor) -> Any:
    """A tensor's bytes, on the host."""
    return tensor.view(torch.uint8).cpu().numpy()
