"""What a reply is worth: a program, so that what training aims at is known exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .cache import Row
from .missing import needed

Reward = Callable[[str], float]  # of a reply
FIRST = 15  # words that nearly every reply has


def load(name: str) -> Reward:
    """The reward of this name: "sentiment", or "plain_words", which is the demo's own."""
    if name == "plain_words":
        from expo.demo.score import plain_words

        return plain_words
    return sentiment(needed("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer())


def sentiment(analyzer: Any) -> Reward:
    """VADER's compound score, -1 to 1, times the share of words that are new: saying a word again does not pay."""

    def reward(reply: str) -> float:
        words = re.findall(r"[a-z']+", reply.lower())
        return float(analyzer.polarity_scores(reply)["compound"]) * len(set(words)) / len(words) if words else 0.0

    return reward


def readings(reward: Reward) -> dict[str, Callable[[Row], float]]:
    """Other ways to judge the same replies: extrapolated models write longer ones, and how much of a gain is length?"""
    return {
        f"the first {FIRST} words of a reply alone": lambda row: reward(" ".join(row["reply"].split()[:FIRST])),
        "0 for a reply that does not end": lambda row: float(row["reward"] * row["finished"]),
    }
