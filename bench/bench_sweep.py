"""How much time does one pass with several alphas save, compared with as many merges?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from bench import rivals
from bench.result_checks import check_exact
from bench.rivals import ALPHA, Times, expo
from bench.rounds import Contest, checkpoint_bytes, cold_cache, run_contest
from bench.sizes import MIDDLE_SIZE, need_disk, size_id

SWEEPS = ((ALPHA,), (ALPHA, 0.5), (0.1, ALPHA, 0.5), (0.1, 0.2, ALPHA, 0.4, 0.5))
SWEEP_ROUNDS = 3


@pytest.mark.parametrize("pair", [MIDDLE_SIZE], indirect=True, ids=size_id)
@pytest.mark.parametrize("alphas", SWEEPS, ids=lambda alphas: f"{len(alphas)}_alphas")
def test_sweep(benchmark: Any, pair: Path, alphas: tuple[float, ...]) -> None:
    """One read gives all outputs; the rival is one merge for each alpha. Every contestant starts from a cold cache."""
    need_disk(MIDDLE_SIZE * len(alphas))
    prepare = cold_cache(pair)

    def separate_merges(pair: Path) -> Times:
        total = 0.0
        for alpha in alphas:
            prepare()
            total += rivals.measure_seconds(functools.partial(expo, pair, alpha))
        return {"separate_merges": total}

    def check_all(out: Path) -> None:
        for alpha in alphas:
            check_exact(out.with_name(f"out-{alpha}"), alpha)

    benchmark.group = f"alphas in one pass, cold cache, {checkpoint_bytes(pair) / 1e9:.2g} GB"
    check_last = functools.partial(check_exact, alpha=alphas[-1])
    sweep = functools.partial(expo, pair, *alphas, out="out-{alpha}")
    contest = Contest(pair, [(separate_merges, check_last)], prepare, SWEEP_ROUNDS, sweep, check_all)
    run_contest(benchmark, contest)
    benchmark.extra_info["alphas"] = len(alphas)
