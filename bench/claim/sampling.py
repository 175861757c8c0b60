"""Training data: the model's own replies to the training prompts, and the best and the worst to each of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expo.search.sampling import SampledReply, Sampler
from expo.search.settings import Sampling

from . import cache
from .cache import Row
from .models import precision
from .reward import Reward
from .settings import Settings


def seed_of(*parts: object) -> int:
    """A seed for a generator, from anything that can be printed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


class Writer:
    """Writes and scores replies of one model."""

    def __init__(self, model: Any, tokenizer: Any, reward: Reward, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._reward = reward

    def __call__(self, prompts: Sequence[str], sampling: Sampling, seed: tuple[object, ...]) -> list[Row]:
        """One row for each prompt, in their order; the chances depend on the seed and the place, and on no alpha."""
        sampler = Sampler(self.model, self.tokenizer, prompts, sampling, seed_of(*seed), self.settings.rows)
        with precision(self.settings.bf16):
            made = {at: one for batch in sampler.batches for at, one in zip(batch, sampler(batch), strict=True)}
        return [self._row(prompt, made[at]) for at, prompt in enumerate(prompts)]

    def _row(self, prompt: str, made: SampledReply) -> Row:
        worth = round(self._reward(made.text), 6)
        tokens = list(made.tokens)
        return {"prompt": prompt, "reply": made.text, "reward": worth, "tokens": tokens, "finished": made.finished}


def training_rows(
    work: Path, writer: Callable[[], Writer], prompts: Sequence[str], settings: Settings, seed: int
) -> list[Row]:
    """All the replies to train on, a file for every batch of them; an interrupted run goes on at the batch."""
    wanted = [prompt for prompt in prompts for _ in range(settings.candidates)]
    found: list[Row] = []
    for start in range(0, len(wanted), settings.rows):
        part = wanted[start : start + settings.rows]

        def make(part: list[str] = part, start: int = start) -> list[Row]:
            return writer()(part, settings.sampling(settings.train_temperature), ("train", seed, start))

        found += cache.rows(work / "replies" / f"{start:05}.jsonl", make)
    return found


def pairs(rows: Sequence[Row], candidates: int) -> list[Row]:
    """The best and the worst of each prompt's replies, in tokens, where they differ."""
    found = []
    for start in range(0, len(rows), candidates):
        group = sorted(rows[start : start + candidates], key=lambda row: row["reward"])
        if group[0]["reward"] < group[-1]["reward"]:
            worse, better = group[0], group[-1]
            found.append({"prompt": better["prompt"], "better": better["tokens"], "worse": worse["tokens"]})
    return found
