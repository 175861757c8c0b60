"""Estimate the time of the rest of a run, from one batch of replies and one step of training on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from expo.search.sampling import encode_prompt

from . import dpo
from .held_out import reply_path
from .sampling import ReplyWriter
from .settings import Settings


class Remaining(NamedTuple):
    """The number of replies to sample and of steps to train."""

    replies: int
    steps: int


def count_remaining(settings: Settings, work: Path, seeds: int) -> Remaining:
    """Return the replies and steps for which the work folder has no file."""
    replies_per_file = settings.held_out_prompts * settings.replies_each
    replies = steps = 0
    for seed in range(seeds):
        folder = work / f"seed{seed}"
        if not (folder / "full").exists():
            stored = len(list((folder / "replies").glob("*.jsonl"))) * settings.rows
            replies += max(0, settings.train_prompts * settings.candidates - stored)
            steps += settings.steps
        files = [folder / "held-out" / "sft.jsonl"]
        files += [reply_path(folder, "early", alpha) for alpha in settings.alphas_early]
        files += [reply_path(folder, "full", alpha) for alpha in settings.alphas_full]
        replies += replies_per_file * sum(not file.exists() for file in files)
    return Remaining(replies, steps)


def measure_speed(writer: ReplyWriter, prompts: list[str]) -> tuple[float, float]:
    """Return the seconds of one reply and of one step of training, which changes the writer's model."""
    settings = writer.settings
    batch = [prompts[i % len(prompts)] for i in range(settings.rows)]
    start = time.monotonic()
    rows = writer(batch, settings.sampling(), ("estimate",))
    reply_seconds = (time.monotonic() - start) / len(rows)
    replies = [rows[i % len(rows)]["tokens"] for i in range(2 * settings.pairs_per_step)]
    pairs = [
        dpo.PreferencePair(encode_prompt(writer.tokenizer, batch[i % len(batch)]), replies[2 * i], replies[2 * i + 1])
        for i in range(settings.pairs_per_step)
    ]
    training = dpo.Training(writer.model, settings)
    training.step(pairs)  # the first step also creates the state of the optimizer
    start = time.monotonic()
    training.step(pairs)
    return reply_seconds, time.monotonic() - start


def format_estimate(remaining: Remaining, reply_seconds: float, step_seconds: float) -> str:
    """Return the estimate in words."""
    seconds = remaining.replies * reply_seconds + remaining.steps * step_seconds
    return (
        f"about {seconds / 60:.0f} minutes: {remaining.replies} replies at {reply_seconds:.3f} s, "
        f"{remaining.steps} steps of training at {step_seconds:.1f} s"
    )
