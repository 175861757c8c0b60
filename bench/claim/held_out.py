"""Sample the replies to the held-out prompts: of a model as it is, and of a live model at every alpha."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from expo.tensors.live import Live

from . import models
from .sampling import ReplyWriter
from .stages import Row, load_rows


class HeldOut(NamedTuple):
    """The held-out prompts of one seed.

    Attributes:
        folder: The folder of the seed.
        prompts: The prompts.
        seed: The seed of the sampling.
    """

    folder: Path
    prompts: Sequence[str]
    seed: int


def sample_replies(writer: ReplyWriter, held_out: HeldOut) -> list[Row]:
    """Return replies to every prompt, as many as the settings name."""
    repeated = [prompt for prompt in held_out.prompts for _ in range(writer.settings.replies_each)]
    return writer(repeated, writer.settings.sampling(), ("held out", held_out.seed))


def load_replies(path: Path, open_writer: Callable[[], ReplyWriter], held_out: HeldOut) -> list[Row]:
    """Return the replies of a model as it is, from a file that is written first if it does not exist."""
    return load_rows(path, lambda: sample_replies(open_writer(), held_out))


def reply_path(folder: Path, role: str, alpha: float) -> Path:
    """Return the file of a checkpoint's replies at an alpha."""
    return folder / "held-out" / f"{role}-{alpha:g}.jsonl"


def sweep_alphas(
    held_out: HeldOut,
    role: str,
    sft: Path,
    alphas: Sequence[float],
    open_writer: Callable[[Path], ReplyWriter],
    report: Callable[[str], None],
) -> dict[float, list[Row]]:
    """Return the replies of a checkpoint at every alpha; only those without a file are sampled.

    Args:
        held_out: The prompts, and the folder that has the checkpoint.
        role: The name of the checkpoint in the folder.
        sft: The folder of the sft model.
        alphas: The alphas.
        open_writer: Loads a model and returns its writer.
        report: Called with a line after each alpha.
    """
    paths = {alpha: reply_path(held_out.folder, role, alpha) for alpha in alphas}
    missing = [alpha for alpha, path in paths.items() if not path.exists()]
    if missing:
        writer = open_writer(held_out.folder / role)
        with Live(writer.model, models.load(sft)) as live:
            for alpha in missing:
                live.alpha = alpha
                rows = load_rows(paths[alpha], lambda: sample_replies(writer, held_out))
                mean = sum(row["reward"] for row in rows) / len(rows)
                report(f"{role}, alpha {alpha:g}: reward {mean:.3f}, for instance: {rows[0]['reply']!r:.100}")
    return {alpha: load_replies(path, _open_no_writer, held_out) for alpha, path in paths.items()}


def _open_no_writer() -> ReplyWriter:
    raise AssertionError("this file exists")
