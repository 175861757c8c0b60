"""Whole merges, process start included, against what people run today and against copying the files.

Every round runs a rival and then ours, so that a drift of the machine meets both; a ratio is the median over the
rounds of ours / rival. Ours is synced to disk, the rivals are not.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from expo.kernels import numerics
from expo.kernels.contract import working_alpha

ROUNDS = 7
ALPHA = 0.3
BASELINES = Path(__file__).with_name("baselines.py")
ROOT = BASELINES.parents[1]
Timed = Callable[[Path], float]  # a rival: the pair's folder to seconds


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _fresh(pair: Path) -> Path:
    """A path that does not exist; what earlier rounds wrote is on the disk, out of the way."""
    for old in pair.glob("out*"):
        shutil.rmtree(old)
    os.sync()
    return pair / "out"


def expo(pair: Path, *alphas: float, out: str = "out") -> None:
    """The command line, as typed."""
    inputs = ("--sft", pair / "sft", "--aligned", pair / "aligned")
    _run(sys.executable, "-m", "expo.fast", *inputs, "--out", pair / out, "--quiet", "--alpha", *alphas)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _cat(*folders: Path) -> None:
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *map(str, files)], stdout=null, check=True)


def _copy(pair: Path, direct: bool) -> None:
    out = _fresh(pair)
    out.mkdir()
    for path in sorted((pair / "aligned").glob("*.safetensors")):
        if direct:
            _run("dd", f"if={path}", f"of={out / path.name}", "bs=8M", "oflag=direct", "status=none")
        else:
            _run("cp", path, out / path.name)


def copying(pair: Path) -> float:
    """cat of sft, and a copy of aligned by the faster of cp and dd oflag=direct."""
    read = _seconds(lambda: _cat(pair / "sft"))
    copies = []
    for direct in (False, True):
        _fresh(pair)
        copies.append(_seconds(lambda direct=direct: _copy(pair, direct)))  # type: ignore[misc]
    return read + min(copies)


def torch_loop(pair: Path) -> float:
    """The safetensors + torch loop, process start included."""
    out = _fresh(pair)
    return _seconds(lambda: _run(sys.executable, BASELINES, "loop", pair / "sft", pair / "aligned", ALPHA, out))


def short_program(pair: Path) -> float:
    """The best short plain-PyTorch program, its start and its import of torch not counted."""
    out = _fresh(pair)
    return float(_run(sys.executable, BASELINES, "short", pair / "sft", pair / "aligned", ALPHA, out))


def _duel(benchmark: Any, rival: Callable[[], float], ours: Callable[[], None], ready: Callable[[], None]) -> None:
    times: list[float] = []

    def setup() -> None:
        times.append(rival())
        ready()

    benchmark.pedantic(ours, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    own = benchmark.stats.stats.data
    ratios = sorted(mine / theirs for mine, theirs in zip(own, times[-len(own) :], strict=True))
    benchmark.extra_info.update(
        rival_median_s=round(statistics.median(times[-len(own) :]), 3),
        ratio_median=round(statistics.median(ratios), 3),
        ratio_min=round(ratios[0], 3),
        ratio_max=round(ratios[-1], 3),
    )


def _bytes_moved(benchmark: Any, pair: Path) -> None:
    size = sum(path.stat().st_size for path in (pair / "aligned").glob("*.safetensors"))
    rate = 3 * size / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(bytes_moved=3 * size, gb_per_s=round(rate, 2))


def _check(pair: Path, out: str = "out") -> None:
    """One shard's tensors against the definition, bit for bit."""
    name = min(path.name for path in (pair / "aligned").glob("*.safetensors"))
    sft, aligned, merged = (safe_open(pair / role / name, "pt") for role in ("sft", "aligned", out))
    for tensor in merged.keys():  # noqa: SIM118, safe_open is no dict
        weak, strong, found = (f.get_tensor(tensor).flatten().view(torch.int16).numpy() for f in (sft, aligned, merged))
        truth = np.empty_like(strong)
        alpha = working_alpha(ALPHA)
        numerics.extrapolate(weak, "BF16", strong, "BF16", strong.size, (truth,), (alpha,), False)
        assert np.array_equal(found, truth), tensor


def _evict(pair: Path) -> None:
    """Take both inputs out of the page cache; needs no rights."""
    os.sync()
    for role in ("sft", "aligned"):
        for path in (pair / role).glob("*.safetensors"):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@pytest.mark.parametrize("rival", [copying, torch_loop, short_program], ids=lambda f: f.__name__)
def test_warm(benchmark: Any, pair: Path, rival: Timed) -> None:
    """Inputs in the page cache."""
    _cat(pair / "sft", pair / "aligned")
    benchmark.group = "merge, inputs cached"
    _duel(benchmark, lambda: rival(pair), lambda: expo(pair, ALPHA), lambda: _fresh(pair) and None)
    _bytes_moved(benchmark, pair)
    _check(pair)


def test_cold(benchmark: Any, pair: Path) -> None:
    """Inputs on the disk: against reading both with cat."""

    def rival() -> float:
        _fresh(pair)
        _evict(pair)
        return _seconds(lambda: _cat(pair / "sft", pair / "aligned"))

    def ready() -> None:
        _fresh(pair)
        _evict(pair)

    benchmark.group = "merge, cold cache"
    _duel(benchmark, rival, lambda: expo(pair, ALPHA), ready)
    _bytes_moved(benchmark, pair)
    _check(pair)


def test_three_alphas_cold(benchmark: Any, pair: Path) -> None:
    """Three outputs from one read, against three merges, each from a cold cache."""
    alphas = (0.1, ALPHA, 0.5)

    def ready() -> None:
        _fresh(pair)
        _evict(pair)

    def rival() -> float:
        total = 0.0
        for alpha in alphas:
            ready()
            total += _seconds(lambda alpha=alpha: expo(pair, alpha))  # type: ignore[misc]
        return total

    benchmark.group = "merge, cold cache"
    _duel(benchmark, rival, lambda: expo(pair, *alphas, out="out-{alpha}"), ready)
    _check(pair, f"out-{ALPHA}")


def _peak(command: list[str]) -> tuple[int, int]:
    """Peak of resident memory and the highest anonymous part seen, in bytes, looked at every 5 ms."""
    process = subprocess.Popen(command, cwd=ROOT)
    resident = anonymous = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields and fields["Name"].strip().startswith("python"):
            resident = int(fields["VmHWM"].split()[0]) * 1024
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]) * 1024)
        time.sleep(0.005)
    assert process.returncode == 0
    return resident, anonymous


def test_peak_memory(benchmark: Any, pair: Path) -> None:
    """Resident memory of a merge, mapped pages included, and its anonymous part."""
    out = _fresh(pair)
    inputs = ["--sft", str(pair / "sft"), "--aligned", str(pair / "aligned"), "--alpha", "0.3", "--out", str(out)]
    command = [sys.executable, "-m", "expo.fast", *inputs, "--quiet"]
    benchmark.group = "memory"
    resident, anonymous = benchmark.pedantic(_peak, args=(command,), rounds=1)
    benchmark.extra_info.update(resident_mb=resident / 1e6, anonymous_mb=anonymous / 1e6)
    _check(pair)


def test_help(benchmark: Any) -> None:
    benchmark.group = "start-up"
    benchmark.pedantic(lambda: _run(sys.executable, "-m", "expo.fast", "--help"), rounds=ROUNDS, warmup_rounds=1)


def test_plan_70b(benchmark: Any, pair_70b: Path) -> None:
    """Headers of 2 x 15 shards, 723 tensors each."""
    inputs = ("--sft", pair_70b / "sft", "--aligned", pair_70b / "aligned", "--alpha", "0.5", "--out", pair_70b / "out")

    def plan() -> None:
        command = [sys.executable, "-m", "expo.fast", *map(str, inputs), "--plan"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 4), done.stderr  # 4: the plan is printed, and the disk is smaller than the model
        assert done.stdout.count("extrapolate") == 723

    benchmark.group = "start-up"
    benchmark.pedantic(plan, rounds=ROUNDS, warmup_rounds=1)
