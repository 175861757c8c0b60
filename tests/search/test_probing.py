"""The alphas that a search tries by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from expo.search.probing import LADDER, next_probe


def run_probes(curve: Callable[[float], float], noise: float = 0.0, budget: int = 8) -> dict[float, float]:
    """Return every alpha that is tried, with its reward."""
    random = np.random.default_rng(0)
    rewards = {0.0: curve(0.0)}
    errors: dict[float, float] = {}
    while (alpha := next_probe(rewards, errors, (), budget)) is not None:
        assert alpha not in rewards
        rewards[alpha] = curve(alpha) + noise * random.normal()
        errors[alpha] = noise
    assert len(rewards) <= budget + 1
    return rewards


def peak(at: float) -> Callable[[float], float]:
    """Return a reward that rises to the best alpha and falls beyond it, steeply from about twice that alpha on."""
    return lambda alpha: 6 - ((alpha - at) / at) ** 2 - (10 if alpha > 2.2 * at + 0.3 else 0)


@pytest.mark.parametrize("at", [0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 2.5, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_probes_find_a_peak(at: float, noise: float) -> None:
    rewards = run_probes(peak(at), noise)
    best = max(rewards, key=lambda alpha: rewards[alpha])
    assert abs(best - at) <= max(0.1, 0.25 * at)


def test_probes_stop_going_up_once_the_reward_has_fallen() -> None:
    assert max(run_probes(peak(0.3))) <= 1.0
    assert max(run_probes(lambda alpha: -alpha)) == LADDER[0]
    assert list(run_probes(lambda alpha: alpha))[:7] == [0.0, *LADDER]
    assert list(run_probes(lambda alpha: 1.0, noise=0.01, budget=3)) == [0.0, *LADDER[:3]]
    assert next_probe({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}) == 2.5
    assert next_probe({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}, collapsed=[1.0]) == 0.75
