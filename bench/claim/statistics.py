"""What the rewards say: means, and 95% intervals from resampling seeds and prompts, the same ones for every model.

An alpha that is chosen where it is judged looks better than it is. So it is chosen on one half of the held-out prompts
and judged on the other, and the other way round, in every resample too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = Any
RESAMPLES = 4000


class Sweeps:
    """Rewards by seed, prompt and alpha, of the early and of the full checkpoint; of sft by seed and prompt."""

    def __init__(self, sft: Array, early: Array, full: Array, alphas_early: Array, alphas_full: Array) -> None:
        self.sft, self.early, self.full = sft, early, full
        self.alphas = {"early": np.asarray(alphas_early, float), "full": np.asarray(alphas_full, float)}
        self._zero = {role: int(np.flatnonzero(alphas == 0)[0]) for role, alphas in self.alphas.items()}

    def picked(self, seeds: Array, prompts: Array) -> Sweeps:
        """Of these seeds and prompts."""
        where = np.ix_(seeds, prompts)
        return Sweeps(self.sft[where], self.early[where], self.full[where], self.alphas["early"], self.alphas["full"])

    def curve(self, role: str) -> Array:
        """The mean reward at every alpha."""
        return getattr(self, role).mean((0, 1))

    def at_zero(self, role: str) -> float:
        """The mean reward of the checkpoint as it is."""
        return float(self.curve(role)[self._zero[role]])

    def at_end(self, role: str) -> float:
        """The mean reward at the largest alpha."""
        return float(self.curve(role)[self.alphas[role].argmax()])

    def best_alpha(self, role: str) -> float:
        """The alpha of the highest mean reward."""
        return float(self.alphas[role][self.curve(role).argmax()])

    def at_best(self, role: str) -> float:
        """The mean reward at the best alpha: chosen on the prompts in even places, judged on the others, and back."""
        rewards = getattr(self, role).mean(0)
        halves = rewards[0::2].mean(0), rewards[1::2].mean(0)
        return float((halves[1][halves[0].argmax()] + halves[0][halves[1].argmax()]) / 2)


FIGURES: dict[str, tuple[str, Callable[[Sweeps], float]]] = {
    "training helps": ("reward of the early model over sft's", lambda s: s.at_zero("early") - float(s.sft.mean())),
    "training on helps": (
        "reward of the full model over the early one's",
        lambda s: s.at_zero("full") - s.at_zero("early"),
    ),
    "rises": (
        "early model: reward at the best alpha over that at 0",
        lambda s: s.at_best("early") - s.at_zero("early"),
    ),
    "collapses": (
        "early model: reward at the best alpha over that at the largest",
        lambda s: s.at_best("early") - s.at_end("early"),
    ),
    "reaches": (
        "early model at its best alpha over the full model as it is",
        lambda s: s.at_best("early") - s.at_zero("full"),
    ),
    "full rises": (
        "full model: reward at the best alpha over that at 0",
        lambda s: s.at_best("full") - s.at_zero("full"),
    ),
    "full collapses": (
        "full model: reward at the best alpha over that at the largest",
        lambda s: s.at_best("full") - s.at_end("full"),
    ),
    "larger alpha": (
        "best alpha of the early model over that of the full one",
        lambda s: s.best_alpha("early") - s.best_alpha("full"),
    ),
    "early over full": (
        "early model at its best alpha over the full one at its own best",
        lambda s: s.at_best("early") - s.at_best("full"),
    ),
}


def resampled(sweeps: Sweeps, times: int = RESAMPLES) -> Iterator[Sweeps]:
    """Seeds and prompts drawn with replacement; a prompt stays in its half."""
    draw = np.random.default_rng(0)
    seeds, prompts = sweeps.sft.shape
    for _ in range(times):
        places = np.empty(prompts, int)
        for half in (0, 1):
            members = np.arange(half, prompts, 2)
            places[half::2] = draw.choice(members, len(members))
        yield sweeps.picked(draw.integers(seeds, size=seeds), places)


def interval(values: Sequence[Any]) -> Array:
    """The middle 95%."""
    return np.percentile(np.asarray(values), [2.5, 97.5], axis=0)


def verdict(low: float, high: float) -> str:
    """What an interval says about a difference."""
    return "yes" if low > 0 else "the opposite" if high < 0 else "not shown"


def summary(sweeps: Sweeps, times: int = RESAMPLES) -> dict[str, Any]:
    """Curves, best alphas and figures, each with its interval."""
    again = list(resampled(sweeps, times))
    found: dict[str, Any] = {"claims": {}, "curves": {}, "best_alpha": {}}
    for name, (meaning, figure) in FIGURES.items():
        low, high = interval([figure(other) for other in again])
        found["claims"][name] = {"what": meaning, **_rounded(figure(sweeps), low, high), "holds": verdict(low, high)}
    for role, alphas in sweeps.alphas.items():
        lows, highs = interval([other.curve(role) for other in again])
        rows = zip(alphas.tolist(), sweeps.curve(role), lows, highs, strict=True)
        found["curves"][role] = [{"alpha": alpha, **_rounded(*rest)} for alpha, *rest in rows]
        low, high = interval([other.best_alpha(role) for other in again])
        one = [sweeps.picked([seed], np.arange(sweeps.sft.shape[1])) for seed in range(len(sweeps.sft))]
        by_seed = [each.best_alpha(role) for each in one]
        found["best_alpha"][role] = {**_rounded(sweeps.best_alpha(role), low, high), "by_seed": by_seed}
    found["sft"] = _rounded(sweeps.sft.mean(), *interval([other.sft.mean() for other in again]))
    return found


def _rounded(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
