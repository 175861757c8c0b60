"""Which tensor of sft is the twin of which of aligned: by name, else under an older name, else as a tied weight.

Pure. Nothing is guessed: a twin under another name has the same shape (rows of the same width, where it is a tie),
is the only one that fits, and its step says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_parts import EMBEDDING, HEAD, SHARED, is_buffer, tie_flag
from ..checkpoints.renames import NameIndex
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE


class Twin(NamedTuple):
    """A tensor of sft; reason: why it is the twin, "" where the names are the same."""

    tensor: TensorInfo
    reason: str


class Pairs(NamedTuple):
    """twins: by aligned's name. kept, dropped: what needs no twin, of aligned and of sft, and the reason.

    unpaired: names of aligned alone. left: names of sft alone.
    """

    twins: dict[str, Twin]
    kept: dict[str, str]
    dropped: dict[str, str]
    unpaired: list[str]
    left: list[str]


def pair(sft: Checkpoint, aligned: Checkpoint) -> Pairs:
    """The fate of every name of both checkpoints."""
    weak, strong = sft.tensors, aligned.tensors
    kept = {name: "a buffer, which the model computes, and no weight" for name, tensor in strong.items()
            if is_buffer(tensor) and is_buffer(weak.get(name, tensor))}  # fmt: skip
    dropped = {name: "a buffer, which the model computes" for name, tensor in weak.items()
               if is_buffer(tensor) and name not in strong}  # fmt: skip
    twins = {name: Twin(weak[name], "") for name in strong if name in weak and name not in kept}
    here = {name: tensor for name, tensor in strong.items() if name not in twins and name not in kept}
    there = {name: tensor for name, tensor in weak.items() if name not in strong and name not in dropped}
    for name, old in _renamed(here, there).items():
        twins[name] = Twin(there.pop(old), f"sft calls it {old}")
        del here[name]
    flags = tie_flag(sft.config), tie_flag(aligned.config)
    tied = _tied(here, weak, flags[0] is not False and flags != (None, False))
    twins |= {name: Twin(weak[other], f"sft ties it to {other}") for name, other in tied.items()}
    used = set(tied.values())
    there = {name: tensor for name, tensor in there.items() if name not in used}
    ties = _tied(there, strong, False not in flags)
    dropped |= {name: f"aligned ties it to {other}" for name, other in ties.items()}
    return Pairs(
        twins, kept, dropped, [name for name in here if name not in tied], [name for name in there if name not in ties]
    )


def _renamed(here: Mapping[str, TensorInfo], there: Mapping[str, TensorInfo]) -> dict[str, str]:
    """From names of one side to names of the other that mean the same; both sides' names are alone so far."""
    if not here or not there:
        return {}
    index = NameIndex(there)
    found: dict[str, str] = {}
    for name, tensor in here.items():
        fits = {old for old in index.find(name) if there[old].shape == tensor.shape}
        if len(fits) == 1:
            found[name] = fits.pop()
    taken = Counter(found.values())
    return {name: old for name, old in found.items() if taken[old] == 1}


def _tied(alone: Mapping[str, TensorInfo], lacking: Mapping[str, TensorInfo], tied: bool) -> dict[str, str]:
    """From the names that one side has alone to the tensor that the other uses in their place, where there is one.

    A head that is missing is the embedding, or the embedding the head, where the two are tied; an encoder and a decoder
    share their embedding.
    """
    heads, embeddings, shared = ([name for name in lacking if kind.search(name)] for kind in (HEAD, EMBEDDING, SHARED))
    found: dict[str, str] = {}
    for name, tensor in alone.items():
        if HEAD.search(name) and not heads and tied:
            fits = [other for other in shared if other.endswith("shared.weight")] or embeddings
        elif EMBEDDING.search(name) and not embeddings and tied:
            fits = heads
        elif SHARED.search(name):
            fits = [other for other in shared if other.endswith("shared.weight")] or shared
        else:
            continue
        if len(fits) == 1 and lacking[fits[0]].shape[1:] == tensor.shape[1:]:
            found[name] = fits[0]
    return found


def mismatched(aligned: TensorInfo, sft: TensorInfo) -> bool:
    """Return True if two twins cannot be extrapolated as they are: by shape, or as one of them has no numbers."""
    return aligned.shape != sft.shape or (aligned.dtype in ITEMSIZE) != (sft.dtype in ITEMSIZE)


def rows_in_common(aligned: TensorInfo, sft: TensorInfo) -> int:
    """Return how many first rows could be extrapolated where only the numbers of rows differ; 0 for none."""
    floating = aligned.dtype in ITEMSIZE and sft.dtype in ITEMSIZE
    if not floating or not aligned.shape or not sft.shape or aligned.shape[1:] != sft.shape[1:]:
        return 0
    return min(aligned.shape[0], sft.shape[0])
