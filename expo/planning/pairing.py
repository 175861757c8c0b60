"""Find the counterpart in sft of each tensor of aligned: under the same name, under an older name, or as a tied weight.

Pairing does not guess. A counterpart under another name has the same shape (a tied weight has rows of the same width)
and is the only tensor that fits, and the reason of its step names the rename or the tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from ..checkpoints.memory_names import MemoryNames
from ..checkpoints.model_parts import EMBEDDING, HEAD, SHARED, is_buffer, is_computed, tie_flag
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.naming import unwrap
from ..checkpoints.renames import NameIndex
from ..checkpoints.safetensors_header import TensorInfo
from ..checkpoints.tied_weights import TiedNames
from ..dtypes import ITEMSIZE
from .layout_runs import Run, Runs, find_runs


class Counterpart(NamedTuple):
    """The tensor of sft that belongs to a tensor of aligned.

    Attributes:
        tensor: The tensor of sft.
        reason: The rename or the tie that pairs the two; "" if both have the same name.
    """

    tensor: TensorInfo
    reason: str


class Pairs(NamedTuple):
    """The pairs of tensors of two models, and the tensors without a counterpart.

    Attributes:
        counterparts: The counterpart of each paired tensor, by the tensor's name in aligned.
        kept: The reason for each tensor of aligned that needs no counterpart, by name.
        dropped: The reason for each tensor of sft that needs no counterpart, by name.
        only_in_aligned: The names of aligned's unpaired tensors.
        only_in_sft: The names of sft's unpaired tensors.
        runs: The runs of each tensor of aligned that has another layout in sft, by name.
        problems: Messages about tensors of two layouts that belong together and do not fit.
    """

    counterparts: dict[str, Counterpart]
    kept: dict[str, str]
    dropped: dict[str, str]
    only_in_aligned: list[str]
    only_in_sft: list[str]
    runs: dict[str, list[Run]]
    problems: list[str]


def pair(sft: ModelTensors, aligned: ModelTensors) -> Pairs:
    """Return the counterpart of each tensor of aligned, and the tensors of both models that have none."""
    of_aligned, of_sft = aligned.tensors, sft.tensors
    kept = {name: "a buffer, which the model computes, and no weight" for name, tensor in of_aligned.items()
            if is_buffer(tensor) and is_buffer(of_sft.get(name, tensor))}  # fmt: skip
    dropped = {name: "a buffer, which the model computes" for name, tensor in of_sft.items()
               if is_buffer(tensor) and name not in of_aligned}  # fmt: skip
    config = aligned.config or sft.config
    kept |= {name: "positions, which the model computes" for name in of_aligned
             if name not in of_sft and is_computed(config, name)}  # fmt: skip
    dropped |= {name: "positions, which the model computes" for name in of_sft
                if name not in of_aligned and is_computed(config, name)}  # fmt: skip
    counterparts = {name: Counterpart(of_sft[name], "") for name in of_aligned if name in of_sft and name not in kept}
    unpaired_aligned = {
        name: tensor for name, tensor in of_aligned.items() if name not in counterparts and name not in kept
    }
    unpaired_sft = {name: tensor for name, tensor in of_sft.items() if name not in of_aligned and name not in dropped}
    memory_names = MemoryNames(sft.config), MemoryNames(aligned.config)
    for find in (partial(_find_memory_names, names=memory_names), _find_renames):
        for name, old_name in find(unpaired_aligned, unpaired_sft).items():
            counterparts[name] = Counterpart(unpaired_sft.pop(old_name), f"sft calls it {old_name}")
            del unpaired_aligned[name]
    layouts = Runs({}, []) if aligned.adapters else find_runs(unpaired_aligned, unpaired_sft, sft, aligned)
    runs = layouts.found
    unpaired_aligned = {name: tensor for name, tensor in unpaired_aligned.items() if name not in runs}
    used = {run.sft.name for each in runs.values() for run in each}
    unpaired_sft = {name: tensor for name, tensor in unpaired_sft.items() if name not in used}
    flags = tie_flag(sft.config), tie_flag(aligned.config)
    tied_names = TiedNames((aligned.config, sft.config))
    # A tensor that sft lacks is not tied if sft's config denies the tie, or if it says nothing and aligned's denies it.
    tied = flags[0] is not False and flags != (None, False)
    twins = _find_twins(unpaired_aligned, of_sft, tied_names, memory_names[::-1]) if tied else {}
    sft_ties = _find_ties(unpaired_aligned, of_sft, tied, twins)
    counterparts |= {name: Counterpart(of_sft[other], f"sft ties it to {other}") for name, other in sft_ties.items()}
    tied_to = set(sft_ties.values())
    unpaired_sft = {name: tensor for name, tensor in unpaired_sft.items() if name not in tied_to}
    # A tensor that aligned lacks is tied only if neither config denies the tie, because a wrong tie drops a tensor.
    tied = False not in flags
    twins = _find_twins(unpaired_sft, of_aligned, tied_names, memory_names) if tied else {}
    aligned_ties = _find_ties(unpaired_sft, of_aligned, tied, twins)
    dropped |= {name: f"aligned ties it to {other}" for name, other in aligned_ties.items()}
    only_in_aligned = [name for name in unpaired_aligned if name not in sft_ties]
    only_in_sft = [name for name in unpaired_sft if name not in aligned_ties]
    return Pairs(counterparts, kept, dropped, only_in_aligned, only_in_sft, runs, layouts.problems)


def _find_memory_names(
    unpaired: Mapping[str, TensorInfo],
    candidates: Mapping[str, TensorInfo],
    names: tuple[MemoryNames, MemoryNames],
) -> dict[str, str]:
    """Return the candidate's name for each unpaired tensor that has the candidate's shape and name in memory.

    Args:
        unpaired: The tensors that aligned alone has.
        candidates: The tensors that sft alone has.
        names: The names in memory of sft and of aligned.
    """
    if not unpaired or not candidates or not any(names):
        return {}
    # A rename may match its own result. So each name counts as it is too, because it may be the name in memory.
    of_sft: dict[str, set[str]] = {}
    for other in candidates:
        for form in (unwrap(other), names[0].find(other)):
            of_sft.setdefault(form, set()).add(other)
    fits = {name: of_sft.get(unwrap(name), set()) | of_sft.get(names[1].find(name), set()) for name in unpaired}
    uses = Counter(other for others in fits.values() for other in others)
    found = {name: next(iter(others)) for name, others in fits.items() if len(others) == 1}
    return {
        name: other
        for name, other in found.items()
        if uses[other] == 1 and unpaired[name].shape == candidates[other].shape
    }


def _find_renames(unpaired: Mapping[str, TensorInfo], candidates: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the candidate's name for each unpaired tensor that has the candidate's shape and an equivalent name.

    A tensor with two candidates stays unpaired, and so do two tensors with the same candidate.
    """
    if not unpaired or not candidates:
        return {}
    index = NameIndex(candidates)
    renames: dict[str, str] = {}
    for name, tensor in unpaired.items():
        fits = {other for other in index.find(name) if candidates[other].shape == tensor.shape}
        if len(fits) == 1:
            renames[name] = fits.pop()
    uses = Counter(renames.values())
    return {name: other for name, other in renames.items() if uses[other] == 1}


def _find_twins(
    unpaired: Mapping[str, TensorInfo],
    others: Mapping[str, TensorInfo],
    tied_names: TiedNames,
    memory_names: tuple[MemoryNames, ...],
) -> dict[str, str]:
    """Return the tied tensor of the other model by the unpaired name, as far as the models' classes name the tie.

    Args:
        unpaired: The tensors that one model alone has.
        others: All tensors of the other model.
        tied_names: The ties of both models' classes.
        memory_names: The names in memory of the one model, and of the other.
    """
    if not unpaired:
        return {}
    own, their = ({name: names.find(name) for name in tensors}
                  for names, tensors in zip(memory_names, (unpaired, others), strict=True))  # fmt: skip
    return tied_names.find(own, their)


def _find_ties(
    unpaired: Mapping[str, TensorInfo], others: Mapping[str, TensorInfo], tied: bool, known: Mapping[str, str]
) -> dict[str, str]:
    """Return the tied tensor that the other model uses in the place of each unpaired tensor, by the unpaired name.

    Models that are not in the table of ties are read by the usual names of heads and embeddings: a model without a head
    uses its embedding, and a model without an embedding uses its head. An encoder and a decoder share their embedding.

    Args:
        unpaired: The tensors that one model alone has.
        others: All tensors of the other model.
        tied: True if the configs allow ties.
        known: The tied tensors that the models' classes name; see `_find_twins`.
    """
    heads, embeddings, shared = ([name for name in others if kind.search(name)] for kind in (HEAD, EMBEDDING, SHARED))
    by_part: dict[str, list[str]] = {}  # a model may have a part with an embedding of its own beside the language model
    for other in embeddings:
        by_part.setdefault(other.partition(".")[0], []).append(other)
    ties: dict[str, str] = {}
    for name, tensor in unpaired.items():
        if name in known:
            fits = [known[name]]
        elif HEAD.search(name) and not heads and tied:
            fits = [other for other in shared if other.endswith("shared.weight")] or by_part.get(
                name.partition(".")[0], embeddings
            )
        elif EMBEDDING.search(name) and not embeddings and tied:
            fits = heads
        elif SHARED.search(name):
            fits = [other for other in shared if other.endswith("shared.weight")] or shared
        else:
            continue
        if len(fits) == 1 and others[fits[0]].shape[1:] == tensor.shape[1:]:
            ties[name] = fits[0]
    return ties


def mismatched(aligned: TensorInfo, sft: TensorInfo) -> bool:
    """Return True if the two shapes differ, or if only one of the two dtypes can be extrapolated."""
    return aligned.shape != sft.shape or (aligned.dtype in ITEMSIZE) != (sft.dtype in ITEMSIZE)


def rows_in_common(aligned: TensorInfo, sft: TensorInfo) -> int:
    """Return the number of first rows that both tensors have; 0 if they differ in more than the number of rows."""
    floating = aligned.dtype in ITEMSIZE and sft.dtype in ITEMSIZE
    if not floating or not aligned.shape or not sft.shape or aligned.shape[1:] != sft.shape[1:]:
        return 0
    return min(aligned.shape[0], sft.shape[0])
