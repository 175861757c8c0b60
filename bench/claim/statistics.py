"""Means of rewards, and their 95% intervals from a bootstrap over seeds and prompts, the same ones for every model.

An alpha that is chosen on the prompts by which it is judged looks better than it is. So it is chosen on one half of the
held-out prompts and judged on the other half, and the other way round, in every resample too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = Any
RESAMPLES = 4000


class Rewards:
    """The rewards of all replies: of sft by [seed, prompt], of both checkpoints by [seed, prompt, alpha]."""

    def __init__(self, sft: Array, early: Array, full: Array, alphas_early: Array, alphas_full: Array) -> None:
        self.sft, self.early, self.full = sft, early, full
        self.alphas = {"early": np.asarray(alphas_early, float), "full": np.asarray(alphas_full, float)}
        self._zero = {role: int(np.flatnonzero(alphas == 0)[0]) for role, alphas in self.alphas.items()}

    def select(self, seeds: Array, prompts: Array) -> Rewards:
        """Return the rewards of these seeds and prompts."""
        index = np.ix_(seeds, prompts)
        return Rewards(self.sft[index], self.early[index], self.full[index], self.alphas["early"], self.alphas["full"])

    def curve(self, role: str) -> Array:
        """Return the mean reward at every alpha."""
        return getattr(self, role).mean((0, 1))

    def at_zero(self, role: str) -> float:
        """Return the mean reward of the checkpoint as it is."""
        return float(self.curve(role)[self._zero[role]])

    def at_largest(self, role: str) -> float:
        """Return the mean reward at the largest alpha."""
        return float(self.curve(role)[self.alphas[role].argmax()])

    def best_alpha(self, role: str) -> float:
        """Return the alpha with the highest mean reward."""
        return float(self.alphas[role][self.curve(role).argmax()])

    def at_best(self, role: str) -> float:
        """Return the mean reward at the best alpha, which is chosen on one half of the prompts for the other half."""
        rewards = getattr(self, role).mean(0)
        halves = rewards[0::2].mean(0), rewards[1::2].mean(0)
        return float((halves[1][halves[0].argmax()] + halves[0][halves[1].argmax()]) / 2)


# Each claim of the paper by a short name: its meaning, and a figure that is above 0 if the claim holds.
FIGURES: dict[str, tuple[str, Callable[[Rewards], float]]] = {
    "training helps": ("reward of the early model over sft's", lambda r: r.at_zero("early") - float(r.sft.mean())),
    "training on helps": (
        "reward of the full model over the early one's",
        lambda r: r.at_zero("full") - r.at_zero("early"),
    ),
    "rises": (
        "early model: reward at the best alpha over that at 0",
        lambda r: r.at_best("early") - r.at_zero("early"),
    ),
    "collapses": (
        "early model: reward at the best alpha over that at the largest",
        lambda r: r.at_best("early") - r.at_largest("early"),
    ),
    "reaches": (
        "early model at its best alpha over the full model as it is",
        lambda r: r.at_best("early") - r.at_zero("full"),
    ),
    "full rises": (
        "full model: reward at the best alpha over that at 0",
        lambda r: r.at_best("full") - r.at_zero("full"),
    ),
    "full collapses": (
        "full model: reward at the best alpha over that at the largest",
        lambda r: r.at_best("full") - r.at_largest("full"),
    ),
    "larger alpha": (
        "best alpha of the early model over that of the full one",
        lambda r: r.best_alpha("early") - r.best_alpha("full"),
    ),
    "early over full": (
        "early model at its best alpha over the full one at its own best",
        lambda r: r.at_best("early") - r.at_best("full"),
    ),
}


def resample(rewards: Rewards, times: int = RESAMPLES) -> Iterator[Rewards]:
    """Yield rewards of seeds and prompts that are drawn with replacement; a prompt stays in its half."""
    random = np.random.default_rng(0)
    seeds, prompts = rewards.sft.shape
    for _ in range(times):
        drawn = np.empty(prompts, int)
        for half in (0, 1):
            members = np.arange(half, prompts, 2)
            drawn[half::2] = random.choice(members, len(members))
        yield rewards.select(random.integers(seeds, size=seeds), drawn)


def interval(values: Sequence[Any]) -> Array:
    """Return the ends of the middle 95% of the values."""
    return np.percentile(np.asarray(values), [2.5, 97.5], axis=0)


def verdict(low: float, high: float) -> str:
    """Return in words what an interval shows about a difference: "yes" if it is above 0."""
    return "yes" if low > 0 else "the opposite" if high < 0 else "not shown"


def summarize(rewards: Rewards, times: int = RESAMPLES) -> dict[str, Any]:
    """Return the claims, the curves and the best alphas, each with its interval."""
    resamples = list(resample(rewards, times))
    summary: dict[str, Any] = {"claims": {}, "curves": {}, "best_alpha": {}}
    for name, (meaning, figure) in FIGURES.items():
        low, high = interval([figure(each) for each in resamples])
        summary["claims"][name] = {"what": meaning, **_round(figure(rewards), low, high), "holds": verdict(low, high)}
    for role, alphas in rewards.alphas.items():
        lows, highs = interval([each.curve(role) for each in resamples])
        points = zip(alphas.tolist(), rewards.curve(role), lows, highs, strict=True)
        summary["curves"][role] = [{"alpha": alpha, **_round(*figures)} for alpha, *figures in points]
        low, high = interval([each.best_alpha(role) for each in resamples])
        all_prompts = np.arange(rewards.sft.shape[1])
        by_seed = [rewards.select([seed], all_prompts).best_alpha(role) for seed in range(len(rewards.sft))]
        summary["best_alpha"][role] = {**_round(rewards.best_alpha(role), low, high), "by_seed": by_seed}
    summary["sft"] = _round(rewards.sft.mean(), *interval([each.sft.mean() for each in resamples]))
    return summary


def _round(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
