"""Sample and score replies, and make training pairs of the best and the worst reply to each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from expo.search.sampling import SampledReply, Sampler
from expo.search.settings import Sampling

from .models import matmul_precision
from .reward import Reward
from .settings import Settings
from .stages import Row, load_rows


def make_seed(*parts: object) -> int:
    """Return a seed that depends on the texts of these objects."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


class ReplyWriter:
    """Writes and scores replies of one model."""

    def __init__(self, model: Any, tokenizer: Any, reward: Reward, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._reward = reward

    def __call__(self, prompts: Sequence[str], sampling: Sampling, seed: tuple[object, ...]) -> list[Row]:
        """Return a row for each prompt; the random numbers depend on the seed and the prompt's number, not on alpha."""
        sampler = Sampler(self.model, self.tokenizer, prompts, sampling, make_seed(*seed), self.settings.rows)
        with matmul_precision(self.settings.bf16):
            replies = {at: reply for batch in sampler.batches for at, reply in zip(batch, sampler(batch), strict=True)}
        return [self._make_row(prompt, replies[at]) for at, prompt in enumerate(prompts)]

    def _make_row(self, prompt: str, reply: SampledReply) -> Row:
        reward = round(self._reward(reply.text), 6)
        tokens = list(reply.tokens)
        return {"prompt": prompt, "reply": reply.text, "reward": reward, "tokens": tokens, "finished": reply.finished}


def load_training_rows(
    work: Path, open_writer: Callable[[], ReplyWriter], prompts: Sequence[str], settings: Settings, seed: int
) -> list[Row]:
    """Return all replies to train on; every batch has a file, so an interrupted run continues with the next batch."""
    repeated = [prompt for prompt in prompts for _ in range(settings.candidates)]
    rows: list[Row] = []
    for start in range(0, len(repeated), settings.rows):
        part = repeated[start : start + settings.rows]

        def sample(part: list[str] = part, start: int = start) -> list[Row]:
            return open_writer()(part, settings.sampling(settings.train_temperature), ("train", seed, start))

        rows += load_rows(work / "replies" / f"{start:05}.jsonl", sample)
    return rows


class RankedReplies(NamedTuple):
    """A prompt, and the tokens of the best and the worst reply to it."""

    prompt: str
    better: list[int]
    worse: list[int]


def rank_replies(rows: Sequence[Row], candidates: int) -> list[RankedReplies]:
    """Return the best and the worst of the `candidates` replies to each prompt whose rewards differ."""
    ranked = []
    for start in range(0, len(rows), candidates):
        group = sorted(rows[start : start + candidates], key=lambda row: row["reward"])
        worse, better = group[0], group[-1]
        if worse["reward"] < better["reward"]:
            ranked.append(RankedReplies(better["prompt"], better["tokens"], worse["tokens"]))
    return ranked
