"""Rank the alphas of a search: mean rewards with their errors, the best alpha, and signs that an alpha is too large.

Every alpha has a reply to the same prompts, so alphas are compared prompt by prompt. A prompt that is easy for one
alpha is easy for the other too, so the mean difference has a smaller error than either mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .replies import Reply

RESAMPLES = 10_000  # of a bootstrap
MOST_DRAWN = 1 << 21  # random numbers that a bootstrap has in memory at a time
FEW_PROMPTS = 50  # with fewer prompts the intervals are rough
LONGER = 2.0  # a warning's threshold: the length of replies over the length of the baseline's
SHARE_RISE = 0.1  # a warning's threshold: how far the share of unfinished or repeated text is above the baseline's
COLLAPSE_RISE = 0.3  # no higher alpha is tried if such a share is further above the baseline's than this
REWARD_FALL = 0.5  # a warning's threshold, in standard deviations of the baseline's rewards
SURE = 2.0  # standard errors beyond which a difference counts as more than noise


@dataclass(frozen=True)
class AlphaResult:
    """The result of one alpha. Shares and means are over its replies.

    Attributes:
        alpha: The alpha.
        replies: The number of replies.
        reward: The mean reward.
        error: The standard error of the mean reward.
        gain: The mean difference from alpha 0, prompt by prompt.
        low: The lower end of the 95% bootstrap interval of the gain.
        high: The upper end of that interval.
        tokens: The mean number of new tokens of a reply.
        unfinished: The share of replies without an end token.
        repetition: The share of repeated 4-grams of tokens.
        warnings: Signs that the alpha is too large.
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
    """The results of all alphas, compared.

    Attributes:
        rows: One result for each alpha, in ascending order.
        best: The alpha with the highest mean reward.
        equals: The alphas whose difference from the best one is within the noise.
        notes: Sentences for the user's warnings.
    """

    rows: tuple[AlphaResult, ...]
    best: float
    equals: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def best_row(self) -> AlphaResult:
        """The result of the best alpha."""
        return next(row for row in self.rows if row.alpha == self.best)

    def verdict(self) -> str:
        """Return the best alpha in words, with its interval and the alphas that are not distinguishable from it."""
        row = self.best_row
        text = f"best: alpha {self.best:g}, mean reward {row.reward:.4g}"
        if self.best == 0:
            text += ": no other alpha that was tried is better than aligned itself"
        else:
            text += f", {row.gain:+.3g} over aligned (95% interval {row.low:+.3g} to {row.high:+.3g})"
        if self.equals:
            names = ", ".join("aligned itself (0)" if alpha == 0 else f"{alpha:g}" for alpha in self.equals)
            text += (
                f"\nnot distinguishable from {names}: the 95% interval of the paired difference over "
                f"{row.replies} prompts contains 0"
            )
        return text


def rank(replies: Mapping[float, Sequence[Reply]]) -> Ranking:
    """Return the ranking of alphas, each with its replies to all prompts in their order; alpha 0 is among them."""
    rewards = {alpha: np.array([reply.reward for reply in replies[alpha]]) for alpha in sorted(replies)}
    means = {alpha: float(values.mean()) for alpha, values in rewards.items()}
    best = max(means, key=lambda alpha: means[alpha])
    rows = tuple(_result_of(alpha, replies[alpha], replies[0.0]) for alpha in rewards)
    equals = []
    for alpha, values in rewards.items():
        low, high = bootstrap_interval(rewards[best] - values)
        if alpha != best and low <= 0 <= high:
            equals.append(alpha)
    return Ranking(rows, best, tuple(equals), tuple(_notes(rows, best, len(replies[0.0]))))


def bootstrap_interval(differences: Any) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean; the same numbers give the same interval."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    random = np.random.default_rng(0)
    at_once = max(1, MOST_DRAWN // n)
    means = []
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        means.append(values[random.integers(n, size=(count, n))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def standard_error(values: Any) -> float:
    """Return the standard error of the mean; it is 0 for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def errors_from_best(replies: Mapping[float, Sequence[Reply]]) -> dict[float, float]:
    """Return the standard error of each alpha's paired difference from the best alpha."""
    rewards = {alpha: np.array([reply.reward for reply in each]) for alpha, each in sorted(replies.items())}
    best = max(rewards.values(), key=lambda values: float(values.mean()))
    return {alpha: standard_error(best - values) for alpha, values in rewards.items()}


def find_warnings(replies: Sequence[Reply], base: Sequence[Reply]) -> tuple[str, ...]:
    """Return the signs that an alpha is too large, by its replies and those of alpha 0 to the same prompts."""
    warnings = []
    tokens, base_tokens = _mean(replies, "new_tokens"), _mean(base, "new_tokens")
    if tokens > LONGER * base_tokens and _is_sure(replies, base, "new_tokens"):
        warnings.append(
            f"replies are {tokens / base_tokens:.1f} times as long as aligned's ({tokens:.0f} tokens, "
            f"{base_tokens:.0f})"
        )
    unfinished, base_unfinished = 1 - _mean(replies, "finished"), 1 - _mean(base, "finished")
    if unfinished > base_unfinished + SHARE_RISE and _is_sure(replies, base, "finished"):
        warnings.append(f"{unfinished:.0%} of the replies do not end, {base_unfinished:.0%} of aligned's")
    repeated, base_repeated = _mean(replies, "repetition"), _mean(base, "repetition")
    if repeated > base_repeated + SHARE_RISE and _is_sure(replies, base, "repetition"):
        warnings.append(f"{repeated:.0%} of the 4-grams are repeated, {base_repeated:.0%} of aligned's")
    reward, base_reward = _mean(replies, "reward"), _mean(base, "reward")
    spread = float(np.std([reply.reward for reply in base]))
    if reward < base_reward - REWARD_FALL * spread and _is_sure(replies, base, "reward"):
        warnings.append(f"the mean reward falls to {reward:.4g}, from aligned's {base_reward:.4g}")
    return tuple(warnings)


def has_collapsed(replies: Sequence[Reply], base: Sequence[Reply]) -> bool:
    """Return True if so many replies lack an end, or repeat themselves, that no higher alpha can be better."""
    unfinished_rise = _mean(base, "finished") - _mean(replies, "finished")
    repetition_rise = _mean(replies, "repetition") - _mean(base, "repetition")
    return max(unfinished_rise, repetition_rise) > COLLAPSE_RISE


def _result_of(alpha: float, replies: Sequence[Reply], base: Sequence[Reply]) -> AlphaResult:
    """Return the result of an alpha, by its replies and those of alpha 0 to the same prompts."""
    rewards = np.array([reply.reward for reply in replies])
    gains = rewards - [reply.reward for reply in base]
    low, high = bootstrap_interval(gains) if alpha else (0.0, 0.0)
    return AlphaResult(
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
        warnings=find_warnings(replies, base) if alpha else (),
    )


def _mean(replies: Sequence[Reply], field: str) -> float:
    """Return the mean of one field of the replies."""
    return float(np.mean([getattr(reply, field) for reply in replies]))


def _is_sure(replies: Sequence[Reply], base: Sequence[Reply], field: str) -> bool:
    """Return True if the mean paired difference of a field is more than noise."""
    pairs = zip(replies, base, strict=True)
    differences = [float(getattr(one, field)) - float(getattr(other, field)) for one, other in pairs]
    return abs(float(np.mean(differences))) > SURE * standard_error(differences)


def _notes(rows: Sequence[AlphaResult], best: float, prompts: int) -> list[str]:
    """Return the warnings of all alphas, and those about the search as a whole."""
    notes = [f"alpha {row.alpha:g}: {warning}" for row in rows for warning in row.warnings]
    base = next(row for row in rows if row.alpha == 0)
    if base.unfinished > 0.5:
        notes.append(
            f"{base.unfinished:.0%} of aligned's own replies do not end: does its generation_config.json name the "
            "token that ends a turn, and is `max_new_tokens` large enough?"
        )
    if best == rows[-1].alpha and best > 0:
        notes.append(f"the best alpha, {best:g}, is the largest that was tried: a larger one may be better")
    if prompts < FEW_PROMPTS:
        notes.append(f"{prompts} prompts are few: the intervals are rough, and the paper used 1000")
    return notes
