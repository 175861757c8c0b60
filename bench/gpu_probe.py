"""Measure the ways of the bytes to a GPU and back: python -m bench.gpu_probe FILE.json (a stage of `make gpu`).

Each part answers one question and gives figures in GB/s unless its name says otherwise. A part that fails is recorded
with its error, and a part for which no time is left is listed as left out; neither stops the others. The command
writes its JSON after each part.

Environment: EXPO_BENCH_GPU_UNTIL is the time.time() at which no part starts any more, EXPO_PROBE_MB the size of buffers
in MB, EXPO_PROBE_PAIR_MB the size of the checkpoints that are merged, EXPO_PROBE_MODELS the numbers of weights of the
models in the GPU's memory, and EXPO_PROBE_ROUNDS the number of rounds whose median counts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

import expo
from bench import bench_gpu
from bench.pairs import scaled_llama, write_pair
from expo.execution.engines import choose
from expo.kernels import numerics, whole_model
from expo.kernels.contract import Operand, extrapolation, working_alpha
from expo.kernels.direct import DirectEngine
from expo.kernels.pinned import pinned
from expo.tensors.originals import available_memory

ROOT = Path(__file__).parents[1]
UNTIL = float(os.environ.get("EXPO_BENCH_GPU_UNTIL", "inf"))
BUFFER = int(float(os.environ.get("EXPO_PROBE_MB", 1024)) * 1e6) // 4096 * 4096
PAIR_BYTES = int(float(os.environ.get("EXPO_PROBE_PAIR_MB", 4000)) * 1e6)
MODELS = [float(words) for words in os.environ.get("EXPO_PROBE_MODELS", "0.5e9 7e9 inf").split()]
LEAST_MODEL = 1_000_000  # a smaller number of weights, as tests have, is one tensor
ROUNDS = int(os.environ.get("EXPO_PROBE_ROUNDS", 5))
THREADS = (1, 2, 4, 8)
LARGEST = 80 * 10**9  # bytes of the largest memory that is registered, if half of the free memory suffices
ALPHA = working_alpha(0.3)
FAULT = "an access of address 4096"
Figures = dict[str, Any]
Part = Callable[[dict[str, Path]], Figures]  # takes a folder in /dev/shm and one on the disk


def rate(work: Callable[[], object], nbytes: float, rounds: int = ROUNDS) -> float:
    """Return the GB/s of some work, the median of several rounds after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(nbytes / median(seconds[1:]) / 1e9, 3)


def device() -> torch.device:
    """Return the GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def read_in_threads(path: Path, into: memoryview, threads: int, flags: int = 0) -> None:
    """Read a file into memory, each thread a part of it, whose begin is a multiple of 4096."""
    part = -(-len(into) // threads // 4096) * 4096
    failures: list[BaseException] = []

    def read(start: int) -> None:
        try:
            file = os.open(path, os.O_RDONLY | flags)
            try:
                stop = min(start + part, len(into))
                while start < stop:
                    count = os.preadv(file, [into[start : min(start + (4 << 20), stop)]], start)
                    assert count > 0, "the file is too short"
                    start += count
            finally:
                os.close(file)
        except BaseException as error:
            failures.append(error)

    crew = [threading.Thread(target=read, args=(start,)) for start in range(0, len(into), part)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def file_of(folder: Path, size: int) -> Iterator[Path]:
    """Give a file of random bytes on the disk or in /dev/shm, in the page cache, and remove it."""
    path = folder / "bytes"
    block = os.urandom(min(size, 1 << 20))
    with open(path, "wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    try:
        yield path
    finally:
        path.unlink()


def read_into_pinned(folders: dict[str, Path]) -> Figures:
    """Read a file from the page cache into pinned memory with 1 to 8 threads."""
    memory = pinned(BUFFER, [device()]).numpy().data
    with file_of(folders["shm"], BUFFER) as path:
        return {
            f"{threads} threads": rate(lambda threads=threads: read_in_threads(path, memory, threads), BUFFER)  # type: ignore[misc]
            for threads in THREADS
        }


def read_past_the_cache(folders: dict[str, Path]) -> Figures:
    """Read a file from the disk with O_DIRECT into registered memory with 1 to 8 threads."""
    memory = pinned(BUFFER, [device()]).numpy().data
    with file_of(folders["disk"], BUFFER) as path:
        return {
            f"{threads} threads": rate(
                lambda threads=threads: read_in_threads(path, memory, threads, os.O_DIRECT),  # type: ignore[misc]
                BUFFER,
                2,
            )
            for threads in THREADS
        }


def register(folders: dict[str, Path]) -> Figures:
    """Register and unregister memory of two sizes; the larger one is up to 80 GB."""
    free = available_memory() or 2 * BUFFER
    figures: Figures = {}
    for size in (BUFFER, max(BUFFER, min(LARGEST, free // 2) if BUFFER > 1e8 else 2 * BUFFER)):
        start = time.perf_counter()
        memory = pinned(size, [device()])
        middle = time.perf_counter()
        del memory
        stop = time.perf_counter()
        name = f"{size / 1e9:.3g} GB"
        figures |= {f"register {name}": round(size / (middle - start) / 1e9, 3)}
        figures |= {f"unregister {name}": round(size / (stop - middle) / 1e9, 3)}
    return figures


def bus(folders: dict[str, Path]) -> Figures:
    """Copy to the GPU, back, and both at the same time; the figure of both counts the bytes of both."""
    hosts = [pinned(BUFFER, [device()]) for _ in range(2)]
    gpus = [torch.zeros(BUFFER, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]

    def up() -> None:
        with torch.cuda.stream(streams[0]):
            gpus[0].copy_(hosts[0], non_blocking=True)

    def down() -> None:
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(gpus[1], non_blocking=True)

    def both() -> None:
        up()
        down()

    return {"up": rate(up, BUFFER), "down": rate(down, BUFFER), "both": rate(both, 2 * BUFFER)}


def zero_copy(folders: dict[str, Path]) -> Figures:
    """Let the kernel read pinned memory of the host, and write it, at three alignments, in GB/s of output."""
    engine, size = DirectEngine(device()), BUFFER // 2 // 4096 * 4096
    memories = [pinned(size + 4096, [device()]).numpy() for _ in range(3)]
    bits = np.random.default_rng(0).integers(0x3A00, 0x3D00, (2, size // 2), np.uint16)
    figures: Figures = {}
    for shift in (16, 8, 2):
        sft, aligned, out = (memory[shift:][:size] for memory in memories)
        sft[:], aligned[:] = bits.view(np.uint8)
        arguments = extrapolation(Operand(sft.data, "BF16"), Operand(aligned.data, "BF16"), (ALPHA,))
        figures[f"alignment {shift}"] = rate(lambda: engine(*arguments, [out.data], False), size)  # noqa: B023
        expected = bytearray(size)
        numerics.extrapolate(*arguments, [expected], False)
        assert bytes(out.data) == expected, f"wrong bits at an alignment of {shift}"
    return figures


def models(folders: dict[str, Path]) -> Figures:
    """Merge models of several sizes in the GPU's memory, each as a part of a copy's rate there."""
    figures: Figures = {}
    for size in MODELS:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        n = int(min(size, 0.9 * free / 6))  # sft, aligned and the output in bf16
        if size != float("inf") and n < size:
            figures[f"{size:.3g} weights"] = f"left out: {6 * size / 1e9:.0f} GB do not fit"
            continue
        lengths = [int(np.prod(shape)) for shape in scaled_llama(n).values()] if n > LEAST_MODEL else [n]
        aligned = torch.empty(sum(lengths), dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        sft = torch.empty_like(aligned).normal_(std=0.02)
        tensors = bench_gpu.Tensors(sft, aligned, aligned.clone().view(1, -1), lengths)
        for contestant in (bench_gpu.plain, bench_gpu.whole_model_in_place, bench_gpu.torch_foreach_lerp_in_place):
            copies, job, seconds = [bench_gpu.copy(tensors)], contestant(tensors), []
            parts = []
            for _ in range(ROUNDS + 1):
                before = bench_gpu.gpu_seconds()
                bench_gpu.run_round(copies, [job], seconds)
                took = bench_gpu.gpu_seconds() - before
                parts.append(job.bytes_moved / took / (copies[0].bytes_moved / seconds[-1]))
            name = f"{sum(lengths) / 1e9:.3g} billion weights, {contestant.__name__}, of a copy"
            figures[name] = round(median(parts[1:]), 3)
        del tensors, aligned, sft, copies, job
    return figures


def merges(folders: dict[str, Path]) -> Figures:
    """Merge a pair from /dev/shm and from the disk by each engine and number of workers, in GB/s of output."""
    figures: Figures = {}
    for place, folder in folders.items():
        room = shutil.disk_usage(folder).free
        size = min(PAIR_BYTES, room // 4)
        pair = write_pair(folder / "pair", scaled_llama(size / 2), 1)
        for engine in ("cpu", "triton"):
            for workers in THREADS:
                if time.time() > UNTIL:
                    figures["left out"] = f"from {place}, {engine} with {workers} workers and later"
                    return figures
                chosen = (choose(engine, "auto" if engine == "triton" else "cpu"),) * workers
                out = folder / "out"
                with mock.patch("expo.merging.job.engines_for", lambda *_, chosen=chosen: chosen):
                    merged = expo.merge(pair / "sft", pair / "aligned", ALPHA, out, quiet=True)
                figures[f"from {place}, {engine}, {workers} workers"] = round(
                    merged.bytes_written / merged.seconds / 1e9, 3
                )
                shutil.rmtree(out)
        shutil.rmtree(pair)
    return figures


def illegal_access(folders: dict[str, Path]) -> Figures:
    """Let a child process make an illegal access: its exit code and the end of its message."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_probe", FAULT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return {"exit code": done.returncode, "message": done.stderr.strip()[-300:]}


def access_illegally() -> None:
    """Launch a kernel for an address that no tensor has, and wait for it; this function fails."""
    table = torch.tensor([[4096, 4096, 4096, 2048]], dtype=torch.int64, device="cuda")
    kind = whole_model.constants("BF16", "BF16", whole_model.ACCESS_BYTES)
    whole_model.Group([0], table, whole_model.SEGMENT, kind).launch(ALPHA)
    torch.cuda.synchronize()
    raise AssertionError(f"{FAULT} did not fail")


PARTS: tuple[Part, ...] = (
    models, bus, zero_copy, register, read_into_pinned, read_past_the_cache, illegal_access, merges,
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run all parts, or those whose names follow the file's, and write the figures after each.

    After an illegal access no work of a process reaches the GPU any more, so a new process takes the parts that follow
    one that fails.

    Returns:
        0 if every part gave figures.
    """
    if list(arguments) == [FAULT]:
        access_illegally()
    file, *names = arguments
    parts = [part for part in PARTS if not names or part.__name__ in names]
    results: dict[str, Any] = json.loads(Path(file).read_text()) if names else {}
    with tempfile.TemporaryDirectory(dir=ROOT) as disk, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        for number, part in enumerate(parts):
            figures = run_part(part, {"shm": Path(shm), "disk": Path(disk)})
            results[part.__name__.replace("_", " ")] = figures
            Path(file).write_text(json.dumps(results, indent=1))
            rest = [each.__name__ for each in parts[number + 1 :]]
            if "error" in figures and rest:
                subprocess.run([sys.executable, "-m", "bench.gpu_probe", file, *rest], cwd=ROOT)
                return 1
    return int(any("error" in figures for figures in results.values()))


def run_part(part: Part, folders: dict[str, Path]) -> Figures:
    """Return a part's figures and its seconds, or the error that ended it, or the reason why it did not start."""
    if time.time() > UNTIL:
        return {"left out": "no time was left"}
    start = time.perf_counter()
    try:
        figures = part(folders)
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {**figures, "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
