"""How long does a merge take if both inputs are on the disk alone?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import rivals
from bench.result_checks import check_copy, check_nothing
from bench.rounds import checkpoint_bytes, cold_cache, plain_contest, rounds_for, run_contest


def test_cold(benchmark: Any, pair: Path) -> None:
    """The rivals read both inputs, which every merge has to do, or copy the files."""
    benchmark.group = f"merge, cold cache, {checkpoint_bytes(pair) / 1e9:.2g} GB"
    contestants = [(rivals.read_both, check_nothing), (rivals.cat_and_cp, check_copy)]
    run_contest(benchmark, plain_contest(pair, contestants, cold_cache(pair), rounds_for(pair)))
