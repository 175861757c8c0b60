"""Warn the reader of a comparison if the pair of checkpoints, or the numbers, are not what a training gives."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sidecars import CARD
from ..merging.result import TOO_FAR
from ..planning.steps import SFT_HAS
from .formatting import count_tensors, format_ranges
from .places import NORMS, OTHER
from .records import Comparison, Part

ALIGNED_NAMES = re.compile(r"(?<![a-z])(dpo|rlhf|ppo|kto|orpo|simpo|grpo|ipo|rlaif|chat|instruct|aligned|it)(?![a-z])")
SFT_NAMES = re.compile(r"(?<![a-z])(sft|base|pretrained|pt)(?![a-z])")
MOST_CARD_CHARACTERS = 1 << 16  # characters of a model card that are read
MOST_NAMES = 5  # names in a warning


def find_warnings(comparison: Comparison) -> Iterator[str]:
    """Yield warnings about the numbers of a comparison."""
    total = comparison.totals
    if not total.changed:
        yield "sft and aligned are equal in all that was compared: is one of the two paths wrong?"
    elif not total.relative_norm < TOO_FAR:
        yield (
            f"aligned - sft is {total.relative_norm:.2g} times as large as aligned itself; for a model and the one it "
            "was trained from it is below 0.1: are the two models unrelated?"
        )
    else:
        yield from _find_unchanged_layers(comparison.layers)
    for role, field in (("sft", "non_finite_sft"), ("aligned", "non_finite_aligned")):
        names = [each.name for each in comparison.tensors if getattr(each, field)]
        if names:
            yield (
                f"{role} has {getattr(total, field)} elements that are inf or NaN, which no norm counts: "
                f"{_list_names(names)}"
            )
    for role in ("sft", "aligned"):
        names = [name for name, reason in comparison.unpaired if reason == f"only in {role}"]
        if names:
            yield f"{count_tensors(len(names))} in {role} alone: {_list_names(names)}"
    yield from _find_differences_of_form(comparison)


def _find_differences_of_form(comparison: Comparison) -> Iterator[str]:
    """Yield warnings about shapes and dtypes that differ."""
    shapes = [f"{name} ({reason})" for name, reason in comparison.not_compared if reason.startswith(SFT_HAS)]
    shapes += [f"{each.name} ({each.note})" for each in comparison.tensors if SFT_HAS in each.note]
    if shapes:
        yield f"{count_tensors(len(shapes))} of another shape in sft: {_list_names(shapes)}"
    differing = [each for each in comparison.tensors if each.sft_dtype != each.dtype]
    dtypes = sorted({f"{each.sft_dtype} in sft and {each.dtype} in aligned" for each in differing})
    if dtypes:
        yield f"dtypes differ ({'; '.join(dtypes)}): an element that rounding alone changed counts as changed"


def _find_unchanged_layers(layers: Sequence[Part]) -> Iterator[str]:
    """Yield a warning if training left whole layers unchanged.

    Norms alone do not count: training may move them by less than their dtype resolves.
    """
    unchanged = [part for part in layers if not part.changed and part.kind not in (NORMS, OTHER)]
    names = []
    for stack in dict.fromkeys(part.stack for part in unchanged if part.stack):
        numbers = [part.layer for part in unchanged if part.stack == stack and part.layer is not None]
        names.append(f"layers {format_ranges(numbers)} of {stack}")
    names += [part.kind for part in unchanged if part.layer is None]
    if names:
        yield f"only part of the model was trained: the same in both are {', '.join(names)}"


def find_swap_evidence(sft: Checkpoint, aligned: Checkpoint) -> Iterator[str]:
    """Yield a warning if files or names show that the two checkpoints are the wrong way round.

    The weights show nothing, because a distance is the same both ways.
    """
    evidence = []
    for base in _find_bases(sft):
        if base in _all_names(aligned) and base not in _all_names(sft):
            evidence.append(f"sft's own files say that it was made from {base}")
            break
    sft_name, aligned_name = model_name(sft).lower(), model_name(aligned).lower()
    sft_looks_aligned = ALIGNED_NAMES.search(sft_name) and not SFT_NAMES.search(sft_name)
    aligned_looks_sft = SFT_NAMES.search(aligned_name) and not ALIGNED_NAMES.search(aligned_name)
    if sft_looks_aligned and aligned_looks_sft:
        evidence.append(f"sft is called {model_name(sft)} and aligned {model_name(aligned)}")
    if evidence:
        yield f"the two may be swapped: {'; '.join(evidence)}. The weights alone do not show it"


def _all_names(checkpoint: Checkpoint) -> set[str]:
    """Return every name under which another model's files may mention a checkpoint."""
    names = model_name(checkpoint), checkpoint.path, os.path.abspath(checkpoint.path), checkpoint.name
    return set(filter(None, names))


def _find_bases(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the models that a config or a model card names as the base of this one, with and without their folder."""
    path = checkpoint.config.get("_name_or_path")
    bases = [path.rstrip("/")] if isinstance(path, str) else []
    if CARD in checkpoint.files:
        with contextlib.suppress(OSError), open(checkpoint.files[CARD], encoding="utf-8", errors="replace") as file:
            front = re.match(r"---\n(.*?)\n---", file.read(MOST_CARD_CHARACTERS), re.DOTALL)
            lines = re.search(r"^base_model:(.*(?:\n *- .*)*)", front[1] if front else "", re.MULTILINE)
            bases += re.findall(r"[\w.-]+/[\w.-]+", lines[1] if lines else "")
    for name in filter(None, bases):
        yield from (name, os.path.basename(name))


def model_name(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's hub id, or else the name of its folder."""
    return checkpoint.origin.name if checkpoint.origin else checkpoint.name


def _list_names(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{', '.join(names[:MOST_NAMES])}{more}"
