"""The reward of a reply: a program, so that the aim of the training is known exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .extras import import_extra
from .stages import Row

Reward = Callable[[str], float]  # a reply's text to its reward
Reading = Callable[[Row], float]  # another reward of a reply that is stored
FIRST_WORDS = 15  # nearly every reply has so many words


def load(name: str) -> Reward:
    """Return the reward of this name: "sentiment", or "plain_words", which is the demo's."""
    if name == "plain_words":
        from expo.demo.score import plain_words

        return plain_words
    return make_sentiment(import_extra("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer())


def make_sentiment(analyzer: Any) -> Reward:
    """Return VADER's compound score (-1 to 1) times the share of distinct words, so repetition does not raise it."""

    def reward(reply: str) -> float:
        words = re.findall(r"[a-z']+", reply.lower())
        return float(analyzer.polarity_scores(reply)["compound"]) * len(set(words)) / len(words) if words else 0.0

    return reward


def make_readings(reward: Reward) -> dict[str, Reading]:
    """Return further rewards of the same replies, by name.

    Extrapolated models write longer replies, and these rewards show how much of a gain comes from the length.
    """
    return {
        f"the first {FIRST_WORDS} words of a reply alone": lambda row: reward(
            " ".join(row["reply"].split()[:FIRST_WORDS])
        ),
        "0 for a reply that does not end": lambda row: float(row["reward"] * row["finished"]),
    }
