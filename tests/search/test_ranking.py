"""The comparison of alphas: paired differences, their intervals, and the warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expo.search.ranking import bootstrap_interval, find_warnings, has_collapsed, rank
from expo.search.replies import Reply


def make_replies(rewards: list[float], **fields: Any) -> list[Reply]:
    base = Reply(0.0, 0, "p", "r", 0.0, 100, True, 0.02)
    return [replace(base, index=index, reward=value, **fields) for index, value in enumerate(rewards)]


def test_the_comparison_is_paired_and_names_alphas_that_it_cannot_distinguish() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(size=400) * 5  # prompts differ far more than alphas do
    noise = {alpha: random.normal(size=400) * 0.5 for alpha in (0.1, 0.2, 0.3)}
    gains = {0.1: 0.0, 0.2: 0.5, 0.3: 0.52}
    by_alpha = {alpha: make_replies(list(hard + gains[alpha] + noise[alpha])) for alpha in noise}
    ranking = rank({0.0: make_replies(list(hard)), **by_alpha})
    assert ranking.best in (0.2, 0.3)
    assert ranking.equals == tuple(alpha for alpha in (0.2, 0.3) if alpha != ranking.best)
    row = ranking.best_row
    assert 0.4 < row.low < row.gain < row.high < 0.7
    assert row.error == pytest.approx(0.25, rel=0.1)
    assert "not distinguishable from 0." in ranking.verdict()
    low, high = bootstrap_interval(noise[0.1])
    normal = 1.96 * noise[0.1].std() / 20
    assert (low, high) == pytest.approx((noise[0.1].mean() - normal, noise[0.1].mean() + normal), abs=0.005)


def test_where_nothing_beats_aligned_it_says_so() -> None:
    ranking = rank({0.0: make_replies([1.0] * 60), 0.5: make_replies([1.0] * 60), 1.0: make_replies([0.0] * 60)})
    assert ranking.best == 0
    assert ranking.equals == (0.5,)
    assert "no other alpha that was tried is better than aligned itself" in ranking.verdict()
    assert "largest" in " ".join(rank({0.0: make_replies([1.0] * 60), 0.5: make_replies([2.0] * 60)}).notes)


def test_a_collapse_is_warned_of() -> None:
    base = make_replies([0.0, 1.0] * 50)
    assert find_warnings(base, base) == ()
    assert find_warnings(make_replies([0.3, 1.3] * 50, new_tokens=150, repetition=0.1), base) == ()
    signs = {
        "4.0 times as long": make_replies([0.0, 1.0] * 50, new_tokens=400),
        "100% of the replies do not end": make_replies([0.0, 1.0] * 50, finished=False),
        "50% of the 4-grams": make_replies([0.0, 1.0] * 50, repetition=0.5),
        "reward falls to -1.5": make_replies([-2.0, -1.0] * 50),
    }
    for sign, broken in signs.items():
        (warning,) = find_warnings(broken, base)
        assert sign in warning
    assert [has_collapsed(broken, base) for broken in signs.values()] == [False, True, True, False]
