"""What a reply is worth: a program, so that what training aims at is known exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .missing import needed

Reward = Callable[[str, bool], float]  # of a reply, and of whether it has ended by itself


def load(name: str) -> Reward:
    """The reward of this name: "sentiment", "ended_sentiment", or "plain_words", which is the demo's own."""
    if name == "plain_words":
        from expo.demo.score import plain_words

        return lambda reply, finished: plain_words(reply)
    analyzer = needed("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return sentiment(analyzer, to_the_end=name == "ended_sentiment")


def sentiment(analyzer: Any, to_the_end: bool = False) -> Reward:
    """VADER's compound score, -1 to 1, times the share of words that are new: saying a word again does not pay.

    to_the_end: a reply that is cut off before it ends is worth nothing.
    """

    def reward(reply: str, finished: bool) -> float:
        words = re.findall(r"[a-z']+", reply.lower())
        if not words or (to_the_end and not finished):
            return 0.0
        return float(analyzer.polarity_scores(reply)["compound"]) * len(set(words)) / len(words)

    return reward
