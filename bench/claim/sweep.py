"""Replies to the held-out prompts: of a model as it is, and of one whose alpha is set in memory, for every alpha."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import expo

from . import cache, models
from .cache import Row
from .sampling import Writer


def own(path: Path, writer: Callable[[], Writer], prompts: Sequence[str], seed: int) -> list[Row]:
    """Replies of the model as it is, kept in a file."""
    return cache.rows(path, lambda: measure(writer(), prompts, seed))


def measure(writer: Writer, prompts: Sequence[str], seed: int) -> list[Row]:
    """Replies to every prompt, as often as the settings say, with the chances of a seed."""
    each = [prompt for prompt in prompts for _ in range(writer.settings.replies_each)]
    return writer(each, writer.settings.sampling(), ("held out", seed))


def file_of(work: Path, role: str, alpha: float) -> Path:
    """Where the replies of a checkpoint at an alpha are kept."""
    return work / "held-out" / f"{role}-{alpha:g}.jsonl"


def sweep(
    work: Path, role: str, sft: Path, writer: Callable[[Path], Writer], alphas: Sequence[float],
    prompts: Sequence[str], seed: int, said: Callable[[str], None],
) -> dict[float, list[Row]]:  # fmt: skip
    """Replies of the checkpoint work/role at every alpha; only what is missing is written."""
    missing = [alpha for alpha in alphas if not file_of(work, role, alpha).exists()]
    if missing:
        made = writer(work / role)
        with expo.Live(made.model, models.load(sft)) as live:
            for alpha in missing:
                live.alpha = alpha
                found = cache.rows(file_of(work, role, alpha), lambda: measure(made, prompts, seed))
                mean = sum(row["reward"] for row in found) / len(found)
                said(f"{role}, alpha {alpha:g}: reward {mean:.3f}, for instance: {found[0]['reply']!r:.100}")
    return {alpha: own(file_of(work, role, alpha), _never, prompts, seed) for alpha in alphas}


def _never() -> Writer:
    raise AssertionError("this file is there")
