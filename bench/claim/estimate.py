"""How long the rest of a run will take, from one batch of replies and one step of training, measured here and now."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from expo.search.sampling import encode_prompt

from . import dpo
from .sampling import Writer
from .settings import Settings
from .sweep import file_of


def outstanding(settings: Settings, work: Path, seeds: int) -> dict[str, int]:
    """Replies to generate and steps to train that no file shows to be done."""
    held_out = settings.held_out_prompts * settings.replies_each
    wanted = {"replies": 0, "steps": 0}
    for seed in range(seeds):
        place = work / f"seed{seed}"
        if not (place / "full").exists():
            done = len(list((place / "replies").glob("*.jsonl"))) * settings.rows
            wanted["replies"] += max(0, settings.train_prompts * settings.candidates - done)
            wanted["steps"] += settings.steps
        files = [place / "held-out" / "sft.jsonl"]
        files += [file_of(place, "early", alpha) for alpha in settings.alphas_early]
        files += [file_of(place, "full", alpha) for alpha in settings.alphas_full]
        wanted["replies"] += held_out * sum(not file.exists() for file in files)
    return wanted


def measured(writer: Writer, prompts: list[str]) -> tuple[float, float]:
    """Seconds of one reply and of one step of training. The writer's model is of no use afterwards."""
    settings = writer.settings
    batch = [prompts[place % len(prompts)] for place in range(settings.rows)]
    begun = time.monotonic()
    made = writer(batch, settings.sampling(), ("estimate",))
    of_reply = (time.monotonic() - begun) / len(made)
    tails = [made[place % len(made)]["tokens"] for place in range(2 * settings.pairs_per_step)]
    pairs = [
        dpo.Pair(encode_prompt(writer.tokenizer, batch[place % len(batch)]), tails[2 * place], tails[2 * place + 1])
        for place in range(settings.pairs_per_step)
    ]
    training = dpo.Training(writer.model, settings)
    training.step(pairs)  # the first one also makes the optimizer's state
    begun = time.monotonic()
    training.step(pairs)
    return of_reply, time.monotonic() - begun


def told(wanted: dict[str, int], of_reply: float, of_step: float) -> str:
    """The estimate in words."""
    parts: dict[str, Any] = {"replies": wanted["replies"] * of_reply, "steps": wanted["steps"] * of_step}
    return (
        f"about {sum(parts.values()) / 60:.0f} minutes: {wanted['replies']} replies at {of_reply:.3f} s, "
        f"{wanted['steps']} steps of training at {of_step:.1f} s"
    )
