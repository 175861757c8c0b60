"""Run comparisons in rounds: every rival once, then the merge, so that a drift of the machine affects all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import page_cache, rivals
from bench.result_checks import Check, check_exact
from bench.rivals import ALPHA, Rival, Times, find_shards, remove_outputs
from bench.sizes import need_memory

Prepare = Callable[[], None]  # called before each contestant of a round
COLD_SHARE = 0.01  # the page cache counts as cold if at most this share of the inputs is in it


class Contest(NamedTuple):
    """A merge and its rivals.

    Attributes:
        pair: The folder with sft/ and aligned/.
        rivals: The rivals, each with the check of its output.
        prepare: Called before each contestant.
        rounds: The number of rounds.
        merge: Called as the merge.
        check: The check of the merge's output.
    """

    pair: Path
    rivals: Sequence[tuple[Rival, Check]]
    prepare: Prepare
    rounds: int
    merge: Callable[[], None]
    check: Check


def plain_contest(pair: Path, contestants: Sequence[tuple[Rival, Check]], prepare: Prepare, rounds: int) -> Contest:
    """Return a contest of rivals against the merge with one alpha."""
    return Contest(pair, contestants, prepare, rounds, lambda: rivals.expo(pair, ALPHA), check_exact)


def run_contest(benchmark: Any, contest: Contest) -> None:
    """Time the merge as the benchmark, and the rivals beside it.

    A first round, which is not timed, warms up and checks the outputs. extra_info["rivals"] gets the seconds of every
    rival, and the ratios of the merge's seconds to the rival's, round by round.
    """
    pair, prepare = contest.pair, contest.prepare
    times: list[Times] = []
    for rival, check in contest.rivals:
        prepare()
        rival(pair)
        check(pair / "out")
    prepare()
    contest.merge()
    contest.check(pair / "out")

    def run_rivals() -> None:
        times.append({})
        for rival, _ in contest.rivals:
            prepare()
            times[-1] |= rival(pair)
        prepare()

    benchmark.pedantic(contest.merge, setup=run_rivals, rounds=contest.rounds)
    seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(
        checkpoint_bytes=checkpoint_bytes(pair),
        rivals={name: _compare(seconds, [each[name] for each in times]) for name in times[0]},
    )


def _compare(seconds: Sequence[float], rival_seconds: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum of a rival's seconds, and of the merge's seconds divided by the rival's."""
    ratios = [own / rival for own, rival in zip(seconds, rival_seconds, strict=True)]
    figures = {
        f"{prefix}{name}": function(values)
        for prefix, values in (("", rival_seconds), ("ratio_", ratios))
        for name, function in (("median", statistics.median), ("min", min), ("max", max))
    }
    return {name: round(value, 4) for name, value in figures.items()}


def checkpoint_bytes(pair: Path) -> int:
    """Return the bytes of aligned's weight files."""
    return sum(path.stat().st_size for path in find_shards(pair / "aligned"))


def rounds_for(pair: Path) -> int:
    """Return the number of rounds for a size: 7 for 0.5 GB, 5 for 2 GB, 3 for 8 GB."""
    size = checkpoint_bytes(pair)
    return 7 if size < 1e9 else 5 if size < 4e9 else 3


def warm_cache(pair: Path, resident: list[float]) -> Prepare:
    """Return a function that removes outputs and reads both inputs into the page cache.

    The function appends the share of the inputs that is in the page cache to `resident`.
    """
    need_memory(2.2 * checkpoint_bytes(pair))
    inputs = find_shards(pair / "sft", pair / "aligned")

    def prepare() -> None:
        remove_outputs(pair)
        if page_cache.resident_share(inputs) < 1:
            rivals.cat(pair / "sft", pair / "aligned")
        resident.append(page_cache.resident_share(inputs))

    return prepare


def cold_cache(pair: Path) -> Prepare:
    """Return a function that removes outputs, and both inputs from the page cache; it skips where that fails."""
    inputs = find_shards(pair / "sft", pair / "aligned")

    def prepare() -> None:
        remove_outputs(pair)
        page_cache.evict(inputs)
        resident = page_cache.resident_share(inputs)
        if resident > COLD_SHARE:
            pytest.skip(f"the cache cannot be made cold: {resident:.0%} of the inputs stay in the page cache")

    return prepare
