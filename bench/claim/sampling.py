"""Training data: the model's own replies to the training prompts, and the best and the worst to each of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import cache
from .cache import Row
from .generate import Drawing, replies
from .models import encode
from .reward import Reward
from .settings import Settings


def seed_of(*parts: object) -> int:
    """A seed for a generator, from anything that can be printed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def drawing_of(settings: Settings, temperature: float) -> Drawing:
    """The settings' way to draw, at a temperature."""
    return Drawing(temperature, settings.top_p, settings.top_k, settings.new_tokens)


class Writer:
    """Writes and scores replies of one model."""

    def __init__(self, model: Any, tokenizer: Any, reward: Reward, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._reward = reward

    def __call__(self, prompts: Sequence[str], temperature: float, seed: tuple[object, ...]) -> Iterator[Row]:
        """One row for each prompt; a batch's chances depend on the seed and on which batch it is, and on no alpha."""
        end = self.model.config.eos_token_id
        drawing = drawing_of(self.settings, temperature)
        for start in range(0, len(prompts), self.settings.rows):
            part = prompts[start : start + self.settings.rows]
            encoded = [encode(self.tokenizer, prompt) for prompt in part]
            made = replies(self.model, encoded, drawing, seed_of(*seed, start), self.settings.bf16)
            for prompt, tokens in zip(part, made, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                finished = tokens[-1] == end
                worth = round(self._reward(text, finished), 6)
                yield {"prompt": prompt, "reply": text, "reward": worth, "tokens": tokens, "finished": finished}


def training_rows(
    work: Path, writer: Callable[[], Writer], prompts: Sequence[str], settings: Settings, seed: int
) -> list[Row]:
    """All the replies to train on, a file for every batch of them; an interrupted run goes on at the batch."""
    wanted = [prompt for prompt in prompts for _ in range(settings.candidates)]
    found: list[Row] = []
    for start in range(0, len(wanted), settings.rows):
        part = wanted[start : start + settings.rows]

        def make(part: list[str] = part, start: int = start) -> list[Row]:
            return list(writer()(part, settings.train_temperature, ("train", seed, start)))

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
