"""The paths of a merge's outputs, one for each alpha, and checks that they fit on their disks and touch no input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import CONFIG
from ..errors import OutputError, UsageError
from ..inputs.locations import StrPath
from ..output.staging import staged_bytes
from ..text import alpha_text, size_text


def check_template(out: StrPath | None, alphas: Sequence[float]) -> None:
    """Raise UsageError if `out` is empty, or if several alphas would share one output."""
    if out is None:
        return
    template = os.fspath(out)
    if not template:
        raise UsageError("`out` is empty: name a folder or a file")
    if len(set(alphas)) > 1 and "{alpha}" not in template:
        raise UsageError(f"{len(alphas)} alphas need an output each: put {{alpha}} into `out`, got {template!r}")


def output_paths(out: StrPath | None, aligned: Checkpoint, alphas: Sequence[float]) -> tuple[str, ...]:
    """Return one path for each alpha; without `out`, paths in the current folder that have aligned's name."""
    suffix = ".safetensors" if aligned.folder is None else ""
    return fill_in(f"{aligned.name}-expo-{{alpha}}{suffix}" if out is None else out, alphas)


def fill_in(template: StrPath, alphas: Sequence[float]) -> tuple[str, ...]:
    """Return the template's path for each alpha."""
    return tuple(os.fspath(template).replace("{alpha}", alpha_text(alpha)) for alpha in alphas)


def check_places(outs: Sequence[str], output_bytes: int, inputs: Sequence[Checkpoint]) -> None:
    """Raise OutputError if an output would touch an input, or if the outputs do not fit on their disks.

    Args:
        outs: The paths of the outputs that are still to be made.
        output_bytes: The bytes of the weight files of one output.
        inputs: Both checkpoints.
    """
    for out in outs:
        for checkpoint in inputs:
            _check_apart(out, checkpoint)
    disks: dict[int, list[str]] = {}
    for out in outs:
        disks.setdefault(os.stat(_existing_parent(out)).st_dev, []).append(out)
    for on_disk in disks.values():
        needed, free = output_bytes * len(on_disk), free_bytes(on_disk[0])
        # A merge reuses or removes the bytes that an interrupted one has staged, so they count as free.
        if free + sum(map(staged_bytes, on_disk)) < needed:
            raise OutputError(
                f"{on_disk[0]}: {size_text(needed)} are needed, but {size_text(free)} are free; free some space or "
                "choose another `out`"
            )


def _check_apart(out: str, checkpoint: Checkpoint) -> None:
    """Raise OutputError if an output is, contains or lies inside the checkpoint's folder or one of its weight files."""
    target = os.path.realpath(out)
    # A shard may be a link to a file outside the checkpoint's folder, so each file is compared too.
    # The folder of an adapter is that of its base, which the paths of two adapters do not name.
    files = (file.path for file in checkpoint.weight_files.values())
    for path in dict.fromkeys(filter(None, (checkpoint.path, checkpoint.folder, *files))):
        source = os.path.realpath(path)
        if os.path.commonpath((target, source)) in (target, source):
            raise OutputError(f"{out} is, contains or lies inside the input {path}; choose another `out`")
    config = checkpoint.files.get(CONFIG)
    folder = os.path.realpath(os.path.dirname(config)) if config and checkpoint.in_parts else None
    if folder is not None and os.path.commonpath((target, folder)) == target:
        raise OutputError(f"{out} is or contains {folder}, which has aligned's {CONFIG}; choose another `out`")


def free_bytes(out: str) -> int:
    """Return the free bytes on the disk that `out` will be on."""
    return shutil.disk_usage(_existing_parent(out)).free


def _existing_parent(out: str) -> str:
    """Return the closest folder above `out` that exists."""
    folder = os.path.dirname(os.path.realpath(out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder
