"""Which alpha to try next, when nobody says which: wide probes upwards, then a shrinking interval around the best.

The paper's way: an alpha of 0.1 to 0.5 suits a model trained to the end, 2.5 to 25 one whose training was cut short,
and past the best one the reward falls sharply. A pure function of what was found, so a search that resumes goes the
same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

LADDER = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
BUDGET = 8  # alphas, besides 0
NOISE = 2.0  # standard errors by which a reward must fall short of the best before it counts as fallen
FINEST = 0.1  # an interval of this width is not divided
SHARE = 1 / 6  # nor one narrower than this share of the best alpha


def next_probe(
    rewards: Mapping[float, float],
    errors: Mapping[float, float] | None = None,
    collapsed: Collection[float] = (),
    budget: int = BUDGET,
) -> float | None:
    """The next alpha to evaluate, or None where enough is known or the budget is spent.

    rewards: mean reward of each alpha that was evaluated, 0 among them. errors: standard error of each one's difference
    from the best. collapsed: alphas whose replies broke down; nothing above one is tried.
    """
    if sum(alpha != 0 for alpha in rewards) >= budget:
        return None
    best = max(sorted(rewards), key=lambda alpha: rewards[alpha])
    top = max(rewards)
    fallen = rewards[best] - rewards[top] > NOISE * (errors or {}).get(top, 0.0)
    if not fallen and top not in collapsed:
        higher = [rung for rung in LADDER if rung > top]
        if higher:
            return higher[0]
    return _inside(rewards, best)


def _inside(rewards: Mapping[float, float], best: float) -> float | None:
    """The middle of an interval beside the best: first the one whose other end is the better."""
    sides = sorted(alpha for alpha in rewards if alpha < best)[-1:]
    sides += sorted(alpha for alpha in rewards if alpha > best)[:1]
    for end in sorted(sides, key=lambda alpha: (-rewards[alpha], alpha)):
        if abs(end - best) > 1.01 * max(FINEST, SHARE * best):
            middle = _rounded((end + best) / 2)
            if middle not in rewards:
                return middle
    return None


def _rounded(alpha: float) -> float:
    """A number that is easy to write: a multiple of 0.05, or two digits."""
    return round(round(alpha * 20) / 20, 2) if alpha < 1 else float(f"{alpha:.2g}")
