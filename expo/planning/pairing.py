"""The counterpart in sft of each tensor of aligned: by name, else under an older name, else as a tied weight.

Pure. Nothing is guessed: a counterpart under another name has the same shape (rows of the same width, where it is a
tie), is the only tensor that fits, and its step says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ..checkpoints.model_parts import EMBEDDING, HEAD, SHARED, is_buffer, tie_flag
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.renames import NameIndex
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE


class Counterpart(NamedTuple):
    """The tensor of sft that belongs to a tensor of aligned; reason: why, "" where the names are the same."""

    tensor: TensorInfo
    reason: str


class Pairs(NamedTuple):
    """The pairs of tensors of two models, and what has no counterpart.

    Attributes:
        counterparts: By aligned's name for the tensor.
        kept: The tensors of aligned that need no counterpart, and the reason.
        dropped: The tensors of sft that need none, and the reason.
        only_in_aligned: The names of aligned's other tensors.
        only_in_sft: The names of sft's other tensors.
    """

    counterparts: dict[str, Counterpart]
    kept: dict[str, str]
    dropped: dict[str, str]
    only_in_aligned: list[str]
    only_in_sft: list[str]


def pair(sft: ModelTensors, aligned: ModelTensors) -> Pairs:
    """Return the counterpart of each of aligned's tensors: by name, else under an older name, else as a tied weight."""
    ours, theirs = aligned.tensors, sft.tensors
    kept = {name: "a buffer, which the model computes, and no weight" for name, tensor in ours.items()
            if is_buffer(tensor) and is_buffer(theirs.get(name, tensor))}  # fmt: skip
    dropped = {name: "a buffer, which the model computes" for name, tensor in theirs.items()
               if is_buffer(tensor) and name not in ours}  # fmt: skip
    counterparts = {name: Counterpart(theirs[name], "") for name in ours if name in theirs and name not in kept}
    only_ours = {name: tensor for name, tensor in ours.items() if name not in counterparts and name not in kept}
    only_theirs = {name: tensor for name, tensor in theirs.items() if name not in ours and name not in dropped}
    for name, other in _renamed(only_ours, only_theirs).items():
        counterparts[name] = Counterpart(only_theirs.pop(other), f"sft calls it {other}")
        del only_ours[name]
    flags = tie_flag(sft.config), tie_flag(aligned.config)
    tied = _tied(only_ours, theirs, flags[0] is not False and flags != (None, False))
    counterparts |= {name: Counterpart(theirs[other], f"sft ties it to {other}") for name, other in tied.items()}
    read = set(tied.values())
    only_theirs = {name: tensor for name, tensor in only_theirs.items() if name not in read}
    ties = _tied(only_theirs, ours, False not in flags)
    dropped |= {name: f"aligned ties it to {other}" for name, other in ties.items()}
    unpaired = [name for name in only_ours if name not in tied], [name for name in only_theirs if name not in ties]
    return Pairs(counterparts, kept, dropped, *unpaired)


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
    """Return True if a pair cannot be extrapolated as it is: by shape, or as one of the two has no numbers."""
    return aligned.shape != sft.shape or (aligned.dtype in ITEMSIZE) != (sft.dtype in ITEMSIZE)


def rows_in_common(aligned: TensorInfo, sft: TensorInfo) -> int:
    """Return how many first rows could be extrapolated where only the numbers of rows differ; 0 for none."""
    floating = aligned.dtype in ITEMSIZE and sft.dtype in ITEMSIZE
    if not floating or not aligned.shape or not sft.shape or aligned.shape[1:] != sft.shape[1:]:
        return 0
    return min(aligned.shape[0], sft.shape[0])
