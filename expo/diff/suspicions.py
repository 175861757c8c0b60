"""What should make the reader of a comparison suspicious: of the pair, or of the numbers."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sidecars import CARD
from ..merging.result import TOO_FAR
from .places import NORMS, OTHER
from .records import Comparison, Part
from .wording import counted, ranges

ALIGNED_NAMES = re.compile(r"(?<![a-z])(dpo|rlhf|ppo|kto|orpo|simpo|grpo|ipo|rlaif|chat|instruct|aligned|it)(?![a-z])")
SFT_NAMES = re.compile(r"(?<![a-z])(sft|base|pretrained|pt)(?![a-z])")
MAX_FRONT = 1 << 16  # characters of a model card that are read
SHOWN = 5  # names in a warning


def suspicions(found: Comparison) -> Iterator[str]:
    """What the numbers say about the pair."""
    total = found.totals
    if not total.changed:
        yield "sft and aligned are equal in all that was compared: is one of the two paths wrong?"
    elif not total.relative_norm < TOO_FAR:
        yield (
            f"aligned - sft is {total.relative_norm:.2g} times as large as aligned itself; for a model and the one it "
            "was trained from it is below 0.1: are these two unrelated?"
        )
    else:
        yield from _frozen(found.layers)
    for role, bad in (("sft", "non_finite_sft"), ("aligned", "non_finite_aligned")):
        names = [each.name for each in found.tensors if getattr(each, bad)]
        if names:
            yield f"{role} has {getattr(total, bad)} elements that are inf or NaN, which no norm counts: {_some(names)}"
    for role in ("sft", "aligned"):
        names = [name for name, reason in found.unpaired if reason == f"only in {role}"]
        if names:
            yield f"{counted(len(names))} in {role} alone: {_some(names)}"
    shapes = [f"{name} ({reason})" for name, reason in found.not_compared if reason.startswith("sft has ")]
    shapes += [f"{each.name} ({each.note})" for each in found.tensors if "sft has " in each.note]
    if shapes:
        yield f"{counted(len(shapes))} of another shape in sft: {_some(shapes)}"
    mixed = sorted({f"{each.sft_dtype} in sft and {each.dtype} in aligned" for each in found.tensors
                    if each.sft_dtype != each.dtype})  # fmt: skip
    if mixed:
        yield f"dtypes differ ({'; '.join(mixed)}): what rounding changed counts as changed"


def _frozen(layers: Sequence[Part]) -> Iterator[str]:
    """Whole layers that training left alone, where there are such; norms alone may be still for want of precision."""
    still = [part for part in layers if not part.changed and part.kind not in (NORMS, OTHER)]
    names = []
    for stack in dict.fromkeys(part.stack for part in still if part.stack):
        numbers = [part.layer for part in still if part.stack == stack and part.layer is not None]
        names.append(f"layers {ranges(numbers)} of {stack}")
    names += [part.kind for part in still if part.layer is None]
    if names:
        yield f"only part of the model was trained: the same in both are {', '.join(names)}"


def swapped(weak: Checkpoint, strong: Checkpoint) -> Iterator[str]:
    """Evidence that the two are the wrong way round. Weights cannot tell: distances are the same both ways."""
    evidence = []
    for base in _bases(weak):
        if base in _names(strong) and base not in _names(weak):
            evidence.append(f"sft's own files say that it was made from {base}")
            break
    ours, theirs = (name_of(each).lower() for each in (weak, strong))
    up, down = ALIGNED_NAMES.search(ours), SFT_NAMES.search(theirs)
    if up and down and not SFT_NAMES.search(ours) and not ALIGNED_NAMES.search(theirs):
        evidence.append(f"sft is called {name_of(weak)} and aligned {name_of(strong)}")
    if evidence:
        yield f"the two may be swapped: {'; '.join(evidence)}. The weights alone cannot tell"


def _names(checkpoint: Checkpoint) -> set[str]:
    path = os.path.abspath(checkpoint.path)
    return {each for each in (name_of(checkpoint), checkpoint.path, path, checkpoint.name) if each}


def _bases(checkpoint: Checkpoint) -> Iterator[str]:
    """What a config or a model card names as the model that this one was made from."""
    named = checkpoint.config.get("_name_or_path")
    found = [named.rstrip("/")] if isinstance(named, str) else []
    if CARD in checkpoint.files:
        with contextlib.suppress(OSError), open(checkpoint.files[CARD], encoding="utf-8", errors="replace") as file:
            front = re.match(r"---\n(.*?)\n---", file.read(MAX_FRONT), re.DOTALL)
            lines = re.search(r"^base_model:(.*(?:\n *- .*)*)", front[1] if front else "", re.MULTILINE)
            found += re.findall(r"[\w.-]+/[\w.-]+", lines[1] if lines else "")
    for name in filter(None, found):
        yield from (name, os.path.basename(name))


def name_of(checkpoint: Checkpoint) -> str:
    """Its hub id, or else its folder's name."""
    return checkpoint.origin.name if checkpoint.origin else checkpoint.name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
