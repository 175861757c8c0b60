"""Choose the next alpha of a search for which the user names no alphas.

The search first tries ever larger alphas, then divides the interval around the best one. The paper gives the range: an
alpha of 0.1 to 0.5 suits a model that was trained to the end, and 2.5 to 25 suits a model whose training was cut short.
Past the best alpha the reward falls sharply. The next alpha depends on the results alone, so a search that was stopped
continues with the same alphas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

LADDER = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
BUDGET = 8  # the default number of alphas, 0 not counted
NOISE = 2.0  # a reward counts as lower than the best one if it is lower by more than this many standard errors
FINEST = 0.1  # an interval of this width is not divided
FINEST_SHARE = 1 / 6  # an interval that is narrower than this share of the best alpha is not divided either


def next_probe(
    rewards: Mapping[float, float],
    errors: Mapping[float, float] | None = None,
    collapsed: Collection[float] = (),
    budget: int = BUDGET,
) -> float | None:
    """Return the next alpha to evaluate, or None if the budget is spent or no further alpha is needed.

    Args:
        rewards: The mean reward of every alpha that has been evaluated, 0 among them.
        errors: For each of these alphas, the standard error of its difference from the best alpha.
        collapsed: Alphas whose replies broke down. No alpha above one of them is tried.
        budget: The number of alphas, 0 not counted, that are tried at most.
    """
    if sum(alpha != 0 for alpha in rewards) >= budget:
        return None
    best = max(sorted(rewards), key=lambda alpha: rewards[alpha])
    largest = max(rewards)
    is_lower = rewards[best] - rewards[largest] > NOISE * (errors or {}).get(largest, 0.0)
    if not is_lower and largest not in collapsed:
        higher = [rung for rung in LADDER if rung > largest]
        if higher:
            return higher[0]
    return _divide(rewards, best)


def _divide(rewards: Mapping[float, float], best: float) -> float | None:
    """Return the middle of an interval beside the best alpha; the interval with the better other end comes first."""
    ends = sorted(alpha for alpha in rewards if alpha < best)[-1:]
    ends += sorted(alpha for alpha in rewards if alpha > best)[:1]
    for end in sorted(ends, key=lambda alpha: (-rewards[alpha], alpha)):
        if abs(end - best) > 1.01 * max(FINEST, FINEST_SHARE * best):
            middle = _round((end + best) / 2)
            if middle not in rewards:
                return middle
    return None


def _round(alpha: float) -> float:
    """Return a nearby number that is short to write: a multiple of 0.05 below 1, else two digits."""
    return round(round(alpha * 20) / 20, 2) if alpha < 1 else float(f"{alpha:.2g}")
