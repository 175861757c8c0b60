"""The stages, seed by seed: replies to train on, training, replies of both checkpoints at every alpha."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from expo.search.sampling import encode_prompt

from . import cache, dpo, estimate, models, prompts, reward, sampling, sweep
from .cache import Row
from .settings import Settings

Said = Callable[[str], None]
ByRole = dict[str, dict[float, list[Row]]]


class Experiment:
    """One experiment in its work folder; whatever is there already is taken from there."""

    def __init__(self, settings: Settings, work: Path, said: Said) -> None:
        cache.guard(work, settings)
        self.settings, self.work = settings, work
        _no_bars()
        begun = time.monotonic()
        self._said: Said = lambda text: said(f"{time.monotonic() - begun:6.0f} s  {text}")
        self.reward = reward.load(settings.reward)
        self.sft = models.start(settings.model, work)
        self._tokenizer = models.load_tokenizer(self.sft)
        self.train, self.held_out = prompts.split(settings.model, settings.train_prompts, settings.held_out_prompts)

    def writer(self, path: Path) -> sampling.Writer:
        """Of replies of a model in a folder."""
        return sampling.Writer(models.load(path), self._tokenizer, self.reward, self.settings)

    def tell_time(self, seeds: int) -> None:
        """Say how long the rest will take; nothing where nothing is left."""
        wanted = estimate.outstanding(self.settings, self.work, seeds)
        if any(wanted.values()):
            self._said(estimate.told(wanted, *estimate.measured(self.writer(self.sft), self.held_out)))

    def seed(self, seed: int) -> tuple[ByRole, dict[str, Any]]:
        """Replies by role and alpha, and the training's log, of one seed; sft's own have the alpha 0."""
        place = self.work / f"seed{seed}"
        writer = functools.cache(lambda: self.writer(self.sft))
        if not (place / "full").exists():
            self._train(place, seed, writer)
        log = json.loads((place / "training.json").read_text(encoding="utf-8"))
        found: ByRole = {"sft": {0: sweep.own(place / "held-out" / "sft.jsonl", writer, self.held_out, seed)}}
        said: Said = lambda text: self._said(f"seed {seed}: {text}")  # noqa: E731
        for role, alphas in (("early", self.settings.alphas_early), ("full", self.settings.alphas_full)):
            found[role] = sweep.sweep(place, role, self.sft, self.writer, alphas, self.held_out, seed, said)
        return found, log

    def _train(self, place: Path, seed: int, writer: Callable[[], sampling.Writer]) -> None:
        settings = self.settings
        rows = sampling.training_rows(place, writer, self.train, settings, seed)
        worth = [row["reward"] for row in rows]
        pairs = [
            dpo.Pair(encode_prompt(self._tokenizer, pair["prompt"]), pair["better"], pair["worse"])
            for pair in sampling.pairs(rows, settings.candidates)
        ]
        self._said(f"seed {seed}: {len(pairs)} pairs of {len(rows)} replies, reward {sum(worth) / len(worth):.3f}")
        pairs = dpo.with_base(writer().model, pairs, settings)
        said: Said = lambda text: self._said(f"seed {seed}: {text}")  # noqa: E731
        log = dpo.train(models.load(self.sft), pairs, settings, seed, place, said)
        kept = {"pairs": len(pairs), "reward_of_replies": round(sum(worth) / len(worth), 4), "log": log}
        cache.write(place / "training.json", json.dumps(kept) + "\n")


def _no_bars() -> None:
    """transformers shows a bar for every model that is read: they would hide what is said."""
    log: Any = transformers.logging
    log.disable_progress_bar()
