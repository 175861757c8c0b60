"""The stages of the experiment, seed by seed: training data, training, and the replies at every alpha."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from expo.search.sampling import encode_prompt

from . import dpo, estimate, held_out, models, prompts, reward, sampling, stages
from .settings import Settings
from .stages import Row

Report = Callable[[str], None]  # called with a line about the progress
RepliesByRole = dict[str, dict[float, list[Row]]]  # replies by the checkpoint's role and by alpha


class Experiment:
    """One experiment in its work folder; every stage that the folder has is read from it."""

    def __init__(self, settings: Settings, work: Path, report: Report) -> None:
        """Load the reward and the tokenizer, and write the sft model; `report` gets lines about the progress."""
        stages.check_settings(work, settings)
        self.settings, self.work = settings, work
        _disable_progress_bars()
        start = time.monotonic()
        self._report: Report = lambda text: report(f"{time.monotonic() - start:6.0f} s  {text}")
        self.reward = reward.load(settings.reward)
        self.sft = models.prepare_sft(settings.model, work)
        self._tokenizer = models.load_tokenizer(self.sft)
        self.train_prompts, self.held_out_prompts = prompts.split(
            settings.model, settings.train_prompts, settings.held_out_prompts
        )

    def open_writer(self, path: Path) -> sampling.ReplyWriter:
        """Load the model of a folder and return the writer of its replies."""
        return sampling.ReplyWriter(models.load(path), self._tokenizer, self.reward, self.settings)

    def report_estimate(self, seeds: int) -> None:
        """Report how long the rest will take, if there is any."""
        remaining = estimate.count_remaining(self.settings, self.work, seeds)
        if any(remaining):
            speed = estimate.measure_speed(self.open_writer(self.sft), self.held_out_prompts)
            self._report(estimate.format_estimate(remaining, *speed))

    def run_seed(self, seed: int) -> tuple[RepliesByRole, dict[str, Any]]:
        """Do one seed; return its replies by role and alpha, sft's under alpha 0, and the log of its training."""
        folder = self.work / f"seed{seed}"
        open_sft = functools.cache(lambda: self.open_writer(self.sft))
        if not (folder / "full").exists():
            self._train(folder, seed, open_sft)
        log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        questions = held_out.HeldOut(folder, self.held_out_prompts, seed)
        replies: RepliesByRole = {
            "sft": {0: held_out.load_replies(folder / "held-out" / "sft.jsonl", open_sft, questions)}
        }
        for role, alphas in (("early", self.settings.alphas_early), ("full", self.settings.alphas_full)):
            replies[role] = held_out.sweep_alphas(
                questions, role, self.sft, alphas, self.open_writer, self._report_of(seed)
            )
        return replies, log

    def _report_of(self, seed: int) -> Report:
        """Return a function that reports a line about a seed."""
        return lambda text: self._report(f"seed {seed}: {text}")

    def _train(self, folder: Path, seed: int, open_sft: Callable[[], sampling.ReplyWriter]) -> None:
        """Sample the training data, train, and write the log."""
        settings, report = self.settings, self._report_of(seed)
        rows = sampling.load_training_rows(folder, open_sft, self.train_prompts, settings, seed)
        mean_reward = sum(row["reward"] for row in rows) / len(rows)
        pairs = [
            dpo.PreferencePair(encode_prompt(self._tokenizer, ranked.prompt), ranked.better, ranked.worse)
            for ranked in sampling.rank_replies(rows, settings.candidates)
        ]
        report(f"{len(pairs)} pairs of {len(rows)} replies, reward {mean_reward:.3f}")
        pairs = dpo.add_reference(open_sft().model, pairs, settings)
        log = dpo.train(models.load(self.sft), pairs, settings, seed, folder, report)
        summary = {"pairs": len(pairs), "reward_of_replies": round(mean_reward, 4), "log": log}
        stages.write_text(folder / "training.json", json.dumps(summary) + "\n")


def _disable_progress_bars() -> None:
    """Hide the progress bar that transformers shows for every model, because it hides the lines of the report."""
    log: Any = transformers.logging
    log.disable_progress_bar()
