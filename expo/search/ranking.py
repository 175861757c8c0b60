"""What a search found: means with their errors, which alpha is best and how sure that is, and what has broken down.

Every alpha replied to the same prompts, so alphas are compared reply by reply: a prompt that is easy for one is easy
for the other, and the difference is known better than either mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .replies import Reply

RESAMPLES = 10_000
AT_ONCE = 1 << 21  # numbers drawn at a time
FEW = 50  # prompts
LONGER = 2.0  # times baseline's length
JUMP = 0.1  # of a share
COLLAPSE = 0.3  # likewise, beyond which no higher alpha is worth its time
FALL = 0.5  # of the standard deviation of baseline's rewards
SURE = 2.0  # standard errors of the difference


@dataclass(frozen=True)
class Row:
    """One alpha. Shares and means are over its replies.

    error: standard error of the reward. gain: mean difference from alpha 0, prompt by prompt, low to high its 95%
    interval by bootstrap. tokens: new ones of a reply. warnings: signs that alpha is too large.
    """

    alpha: float
    replies: int
    reward: float
    error: float
    gain: float
    low: float
    high: float
    tokens: float
    unfinished: float
    repetition: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """best: alpha of the highest mean reward. equals: those whose difference from it is within the noise."""

    rows: tuple[Row, ...]
    best: float
    equals: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def best_row(self) -> Row:
        return next(row for row in self.rows if row.alpha == self.best)

    def verdict(self) -> str:
        """In words, with how sure it is."""
        row = self.best_row
        text = f"best: alpha {self.best:g}, mean reward {row.reward:.4g}"
        if self.best == 0:
            text += ": no alpha that was tried is better than aligned itself"
        else:
            text += f", {row.gain:+.3g} over aligned (95% interval {row.low:+.3g} to {row.high:+.3g})"
        if self.equals:
            names = ", ".join("aligned itself (0)" if alpha == 0 else f"{alpha:g}" for alpha in self.equals)
            text += (
                f"\nnot distinguishable from {names}: the 95% interval of the paired difference over "
                f"{row.replies} prompts contains 0"
            )
        return text


def rank(found: Mapping[float, Sequence[Reply]]) -> Ranking:
    """found: the replies to all prompts, in their order, of every alpha; 0 among them."""
    rewards = {alpha: np.array([reply.reward for reply in found[alpha]]) for alpha in sorted(found)}
    means = {alpha: float(values.mean()) for alpha, values in rewards.items()}
    best = max(means, key=lambda alpha: means[alpha])
    rows = tuple(_row(alpha, found[alpha], found[0.0]) for alpha in rewards)
    equals = []
    for alpha, values in rewards.items():
        low, high = interval(rewards[best] - values)
        if alpha != best and low <= 0 <= high:
            equals.append(alpha)
    return Ranking(rows, best, tuple(equals), tuple(_notes(rows, best, len(found[0.0]))))


def interval(differences: Any) -> tuple[float, float]:
    """95% bootstrap interval of a mean, the same for the same numbers."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    random = np.random.default_rng(0)
    means = []
    for start in range(0, RESAMPLES, max(1, AT_ONCE // n)):
        count = min(max(1, AT_ONCE // n), RESAMPLES - start)
        means.append(values[random.integers(n, size=(count, n))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def standard_error(values: Any) -> float:
    """Of the mean; 0 of a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def errors_from_best(found: Mapping[float, Sequence[Reply]]) -> dict[float, float]:
    """Standard error of each alpha's paired difference from the best one."""
    rewards = {alpha: np.array([reply.reward for reply in replies]) for alpha, replies in sorted(found.items())}
    best = max(rewards.values(), key=lambda values: float(values.mean()))
    return {alpha: standard_error(best - values) for alpha, values in rewards.items()}


def warnings_of(replies: Sequence[Reply], base: Sequence[Reply]) -> tuple[str, ...]:
    """Signs that an alpha is too large, against the replies of alpha 0."""
    found = []
    tokens, normal = _mean(replies, "new_tokens"), _mean(base, "new_tokens")
    if tokens > LONGER * normal and _sure(replies, base, "new_tokens"):
        found.append(
            f"replies are {tokens / normal:.1f} times as long as aligned's ({tokens:.0f} tokens, {normal:.0f})"
        )
    unfinished, usual = 1 - _mean(replies, "finished"), 1 - _mean(base, "finished")
    if unfinished > usual + JUMP and _sure(replies, base, "finished"):
        found.append(f"{unfinished:.0%} of the replies do not end, {usual:.0%} of aligned's")
    again, before = _mean(replies, "repetition"), _mean(base, "repetition")
    if again > before + JUMP and _sure(replies, base, "repetition"):
        found.append(f"{again:.0%} of the 4-grams are repeated, {before:.0%} of aligned's")
    reward, was = _mean(replies, "reward"), _mean(base, "reward")
    spread = float(np.std([reply.reward for reply in base]))
    if reward < was - FALL * spread and _sure(replies, base, "reward"):
        found.append(f"the mean reward falls to {reward:.4g}, from aligned's {was:.4g}")
    return tuple(found)


def collapsed(replies: Sequence[Reply], base: Sequence[Reply]) -> bool:
    """Whether so many more replies than alpha 0's do not end, or repeat themselves, that it can only get worse."""
    unending = _mean(base, "finished") - _mean(replies, "finished")
    return max(unending, _mean(replies, "repetition") - _mean(base, "repetition")) > COLLAPSE


def _row(alpha: float, replies: Sequence[Reply], base: Sequence[Reply]) -> Row:
    rewards = np.array([reply.reward for reply in replies])
    gains = rewards - [reply.reward for reply in base]
    low, high = interval(gains) if alpha else (0.0, 0.0)
    return Row(
        alpha=alpha,
        replies=len(replies),
        reward=float(rewards.mean()),
        error=standard_error(rewards),
        gain=float(gains.mean()),
        low=low,
        high=high,
        tokens=_mean(replies, "new_tokens"),
        unfinished=1 - _mean(replies, "finished"),
        repetition=_mean(replies, "repetition"),
        warnings=warnings_of(replies, base) if alpha else (),
    )


def _mean(replies: Sequence[Reply], what: str) -> float:
    return float(np.mean([getattr(reply, what) for reply in replies]))


def _sure(replies: Sequence[Reply], base: Sequence[Reply], what: str) -> bool:
    """Whether a difference is beyond the noise."""
    pairs = zip(replies, base, strict=True)
    differences = [float(getattr(one, what)) - float(getattr(other, what)) for one, other in pairs]
    return abs(float(np.mean(differences))) > SURE * standard_error(differences)


def _notes(rows: Sequence[Row], best: float, prompts: int) -> list[str]:
    notes = [f"alpha {row.alpha:g}: {warning}" for row in rows for warning in row.warnings]
    base = next(row for row in rows if row.alpha == 0)
    if base.unfinished > 0.5:
        notes.append(
            f"{base.unfinished:.0%} of aligned's own replies do not end: does its generation_config.json name the "
            "token that ends a turn, and is --max-new-tokens large enough?"
        )
    if best == rows[-1].alpha and best > 0:
        notes.append(f"the best alpha, {best:g}, is the largest that was tried: a larger one may be better")
    if prompts < FEW:
        notes.append(f"{prompts} prompts are few: the intervals are rough, and the paper used 1000")
    return notes
