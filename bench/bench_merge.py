"""Whole merges, process start included, against what people run today and against copying the files.

See `rounds.py` for how a round goes, and `rivals.py` for what is synced. EXPO_BENCH_GB=0.5,2,8 sets the sizes of one
checkpoint in GB. The bytes that a merge needs are two reads and a write of a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import pages, rivals
from bench.rivals import ALPHA, Times, expo, fresh, shards
from bench.rounds import close, copied, duel, exact, nothing
from bench.sizes import MIDDLE, SLOW_ALSO, need_disk, need_memory, size_id

SWEEPS = {1: (ALPHA,), 2: (ALPHA, 0.5), 3: (0.1, ALPHA, 0.5), 5: (0.1, 0.2, ALPHA, 0.4, 0.5)}


def rounds(pair: Path) -> int:
    """7 for half a GB, 5 for 2, 3 for 8."""
    size = _bytes(pair)
    return 7 if size < 1e9 else 5 if size < 4e9 else 3


def _bytes(pair: Path) -> int:
    return sum(path.stat().st_size for path in shards(pair / "aligned"))


def _inputs(pair: Path) -> list[Path]:
    return shards(pair / "sft", pair / "aligned")


def warmed(pair: Path, resident: list[float]) -> Callable[[], None]:
    """Before a contestant: no output, both inputs in the page cache; the share that is goes to `resident`."""
    need_memory(2.2 * _bytes(pair))

    def ready() -> None:
        fresh(pair)
        if pages.resident(_inputs(pair)) < 1:
            rivals.cat(pair / "sft", pair / "aligned")
        resident.append(pages.resident(_inputs(pair)))

    return ready


def chilled(pair: Path) -> Callable[[], None]:
    """Before a contestant: no output, and neither input in the page cache."""

    def ready() -> None:
        fresh(pair)
        pages.evict(_inputs(pair))
        left = pages.resident(_inputs(pair))
        if left > 0.01:
            pytest.skip(f"no cold cache here: {left:.0%} of the inputs stay in the page cache")

    return ready


def _warm(benchmark: Any, pair: Path, contestants: list[Any], count: int) -> None:
    resident: list[float] = []
    benchmark.group = f"merge, inputs cached, {_bytes(pair) / 1e9:.2g} GB"
    duel(benchmark, pair, contestants, warmed(pair, resident), count)
    benchmark.extra_info["inputs_resident_min"] = round(min(resident), 4)


def test_warm(benchmark: Any, pair: Path) -> None:
    """Inputs in the page cache: copying, and the short PyTorch program."""
    contestants = [(rivals.cat_and_cp, copied), (rivals.cat_and_dd, copied), (rivals.short, close)]
    _warm(benchmark, pair, contestants, rounds(pair))


@pytest.mark.parametrize("pair", SLOW_ALSO, indirect=True, ids=size_id)
@pytest.mark.parametrize("rival", [rivals.loop, rivals.paper, rivals.mergekit], ids=lambda f: f.__name__)
def test_warm_slow(benchmark: Any, pair: Path, rival: rivals.Rival) -> None:
    """Inputs in the page cache: the usual programs, few rounds."""
    _warm(benchmark, pair, [(rival, exact if rival is rivals.loop else close)], 2)


def test_cold(benchmark: Any, pair: Path) -> None:
    """Inputs on the disk: reading both, which is the least, and copying."""
    benchmark.group = f"merge, cold cache, {_bytes(pair) / 1e9:.2g} GB"
    contestants = [(rivals.read_both, nothing), (rivals.cat_and_cp, copied)]
    duel(benchmark, pair, contestants, chilled(pair), rounds(pair))


@pytest.mark.parametrize("pair", [MIDDLE], indirect=True, ids=size_id)
@pytest.mark.parametrize("alphas", SWEEPS.values(), ids=lambda alphas: f"{len(alphas)}_alphas")
def test_sweep(benchmark: Any, pair: Path, alphas: tuple[float, ...]) -> None:
    """K outputs from one read, against K merges, each from a cold cache."""
    need_disk(MIDDLE * len(alphas))
    ready = chilled(pair)

    def separate(pair: Path) -> Times:
        total = 0.0
        for alpha in alphas:
            ready()
            total += rivals.seconds(functools.partial(expo, pair, alpha))
        return {"separate_merges": total}

    def check(out: Path) -> None:
        for alpha in alphas:
            exact(out.with_name(f"out-{alpha}"), alpha)

    benchmark.group = f"alphas in one pass, cold cache, {_bytes(pair) / 1e9:.2g} GB"
    last = functools.partial(exact, alpha=alphas[-1])
    sweep = functools.partial(expo, pair, *alphas, out="out-{alpha}")
    duel(benchmark, pair, [(separate, last)], ready, 3, sweep, check)
    benchmark.extra_info["alphas"] = len(alphas)
