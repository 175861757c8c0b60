"""How long does a merge take if both inputs are in the page cache?

The time of a merge includes the start of its process. rounds.py explains the rounds, and rivals.py explains which times
include a sync. EXPO_BENCH_GB=0.5,2,8 sets the sizes of one checkpoint in GB. A merge moves the bytes of three
checkpoints: it reads two and writes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import rivals
from bench.result_checks import Check, check_close, check_copy, check_exact
from bench.rounds import checkpoint_bytes, plain_contest, rounds_for, run_contest, warm_cache
from bench.sizes import SLOW_RIVAL_SIZES, size_id

SLOW_RIVAL_ROUNDS = 2


def _run(benchmark: Any, pair: Path, contestants: Sequence[tuple[rivals.Rival, Check]], rounds: int) -> None:
    resident: list[float] = []
    benchmark.group = f"merge, inputs cached, {checkpoint_bytes(pair) / 1e9:.2g} GB"
    run_contest(benchmark, plain_contest(pair, contestants, warm_cache(pair, resident), rounds))
    benchmark.extra_info["inputs_resident_min"] = round(min(resident), 4)


def test_warm(benchmark: Any, pair: Path) -> None:
    """The rivals copy the files, or are the short PyTorch program."""
    contestants = [(rivals.cat_and_cp, check_copy), (rivals.cat_and_dd, check_copy), (rivals.short, check_close)]
    _run(benchmark, pair, contestants, rounds_for(pair))


@pytest.mark.parametrize("pair", SLOW_RIVAL_SIZES, indirect=True, ids=size_id)
@pytest.mark.parametrize("rival", [rivals.loop, rivals.paper, rivals.mergekit], ids=lambda f: f.__name__)
def test_warm_slow(benchmark: Any, pair: Path, rival: rivals.Rival) -> None:
    """The rivals are the usual programs, which are slow, so there are few rounds."""
    check = check_exact if rival is rivals.loop else check_close
    _run(benchmark, pair, [(rival, check)], SLOW_RIVAL_ROUNDS)
