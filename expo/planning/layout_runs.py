"""Pair tensors of files with the tensors that they become in memory, as runs of elements that follow each other.

transformers fuses tensors when it loads a model: the experts of a layer, for example, are one tensor in memory and one
tensor each in published files. FSDP, accelerate and `zero_to_fp32.py` write the tensors in memory. A run is the part of
a tensor in memory that one tensor of a file becomes, or the part of a file's tensor that one tensor in memory is. Both
are bytes that follow each other, so a run is extrapolated as any tensor is. Conversions that transpose are not paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

from ..checkpoints.layouts import Fusion, Place, find_layouts
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.safetensors_header import TensorInfo, describe
from ..dtypes import ITEMSIZE

MOST_OUTER = 4096  # parts of a tensor for each tensor that it is made of


class Run(NamedTuple):
    """A part of a tensor of aligned, and the part of a tensor of sft that belongs to it, of one shape.

    Attributes:
        aligned: The part of aligned's tensor; the run's bytes in its file.
        sft: The part of sft's tensor.
        reason: The relation of the two tensors, for the user.
    """

    aligned: TensorInfo
    sft: TensorInfo
    reason: str


class Runs(NamedTuple):
    """The runs of all tensors that have another layout in sft.

    Attributes:
        found: The runs of each tensor of aligned, by name, in the tensor's order.
        problems: Messages about tensors that one conversion should have, and that are missing or do not fit.
    """

    found: dict[str, list[Run]]
    problems: list[str]


class _Part(NamedTuple):
    """The relation of a tensor in a file and a tensor in memory: parts of both, of one shape."""

    memory: TensorInfo
    file: TensorInfo


def find_runs(
    unpaired: Mapping[str, TensorInfo], candidates: Mapping[str, TensorInfo], sft: ModelTensors, aligned: ModelTensors
) -> Runs:
    """Return the runs of each tensor of aligned whose counterpart has another layout in sft.

    A tensor is paired if the table of layouts has its conversion for the model that a config names, and if the tensors
    of both sides are complete and have the shapes that the conversion gives.

    Args:
        unpaired: The tensors that aligned alone has.
        candidates: The tensors that sft alone has.
        sft: The model sft, whose config may name the model.
        aligned: The model aligned, whose config counts before that of sft.
    """
    configs = [config for config in (aligned.config, sft.config) if config.get("model_type")]
    if not unpaired or not candidates or not configs:
        return Runs({}, [])
    runs: dict[str, list[Run]] = {}
    problems: list[str] = []
    for layout in find_layouts(*configs):
        places = {name: layout.find_place(layout.rename(name)) for name in (*unpaired, *candidates)}
        for part in _find_parts(candidates, unpaired, places, layout.rename, problems):
            reason = f"sft has it as tensors like {part.file.name}"
            runs.setdefault(part.memory.name, []).append(Run(part.memory, part.file, reason))
        for part in _find_parts(unpaired, candidates, places, layout.rename, problems):
            runs.setdefault(part.file.name, []).append(Run(part.file, part.memory, f"sft has it in {part.memory.name}"))
    return Runs({name: sorted(each, key=lambda run: run.aligned.start) for name, each in runs.items()}, problems)


def _find_parts(
    files: Mapping[str, TensorInfo],
    memory: Mapping[str, TensorInfo],
    places: Mapping[str, Place | None],
    rename: Callable[[str], str],
    problems: list[str],
) -> list[_Part]:
    """Return the parts of complete conversions of a file's tensors into tensors in memory.

    Args:
        files: The tensors that may be published ones, by name.
        memory: The tensors that may be those in memory, by name.
        places: The place of each name in its conversion; None for a name without one.
        rename: Returns the name in memory of a published name.
        problems: A list that gets a message for each conversion without parts.
    """
    in_memory = {rename(name): tensor for name, tensor in memory.items()}
    sets: dict[tuple[Fusion, tuple[str, ...]], dict[tuple[int, int], TensorInfo]] = {}
    ambiguous = set()  # conversions in which two tensors have one place, such as `experts.3` and `experts.03`
    for name, tensor in files.items():
        place = places[name]
        if place is not None and all(target in in_memory for target in place.targets):
            sources = sets.setdefault((place.fusion, place.targets), {})
            if (place.source, place.expert) in sources:
                ambiguous.add((place.fusion, place.targets))
            sources[place.source, place.expert] = tensor
    found: list[_Part] = []
    for (fusion, targets), sources in sets.items():
        in_model = [in_memory[target] for target in targets]
        parts = [] if (fusion, targets) in ambiguous else _parts_of(fusion, sources, in_model)
        found += parts
        if not parts and fusion.stacks:
            problems.append(_why_no_parts(fusion, sources, in_model))
    return found


def _why_no_parts(fusion: Fusion, sources: Mapping[tuple[int, int], TensorInfo], targets: Sequence[TensorInfo]) -> str:
    """Return the message about a conversion that `_parts_of` has no parts for; the arguments are its arguments."""
    first = next(iter(sources.values()))
    pair = f"{targets[0].name} ({describe(targets[0])}) and tensors like {first.name} ({describe(first)})"
    experts = targets[0].shape[0] if fusion.stacks and targets[0].shape else 1
    missing = [
        f"expert {expert} of {fusion.sources[source].pattern.split('.')[-2].rstrip(chr(92))}"
        for expert in range(experts)
        for source in range(len(fusion.sources))
        if (source, expert) not in sources
    ]
    if fusion.stacks and missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{pair} are the same experts in two layouts, but {missing[0]}{others} is missing: save that model again"
    return (
        f"{pair} are the same weights in two layouts, but their numbers or shapes do not fit together: save both "
        "models in one layout, or save the damaged one again"
    )


def _parts_of(
    fusion: Fusion, sources: Mapping[tuple[int, int], TensorInfo], targets: Sequence[TensorInfo]
) -> list[_Part]:
    """Return the parts of one conversion; none if it is not complete, or if its parts are no runs of elements.

    Args:
        fusion: The conversion.
        sources: The tensors of the files by (source, expert).
        targets: The tensors in memory.
    """
    experts = max(expert for _, expert in sources) + 1
    order = [(source, expert) for expert in range(experts) for source in range(len(fusion.sources))]
    tensors = [*sources.values(), *targets]
    if sorted(order) != sorted(sources) or any(each.dtype not in ITEMSIZE or not each.shape for each in tensors):
        return []
    ordered = [sources[key] for key in order]
    if fusion.operations == (("chunk", 0),) and len(ordered) == 1:
        parts = _cut(ordered[0], targets)
        return [_Part(target, part) for part, target in zip(parts, targets, strict=False)]
    if len(targets) == 1 and [verb for verb, *_ in fusion.operations] == ["concatenate"] and fusion.operations[0][1]:
        return _cut_inside(targets[0], ordered, fusion.operations[0][1])
    stacked = fusion.operations[:1] == (("stack", 0),)
    joined = (("concatenate", int(stacked)),)
    if len(targets) != 1 or fusion.operations[int(stacked) :] not in ((), joined):
        return []
    parts = _cut(targets[0], ordered, experts if stacked else None)
    return [_Part(part, source) for part, source in zip(parts, ordered, strict=False)]


def _cut(whole: TensorInfo, parts: Sequence[TensorInfo], experts: int | None = None) -> list[TensorInfo]:
    """Return the parts of a tensor that have the shapes of other tensors, one after the other; none if they do not fit.

    Args:
        whole: The tensor. Its rows are those of all parts; with experts, its first dimension counts them, and its
            second one has the rows of the parts of one expert.
        parts: The other tensors; with experts, those of one expert follow each other.
        experts: The number of experts; None without.
    """
    shapes = [part.shape for part in parts]
    each = len(shapes) // (experts or 1)
    rows = sum(shape[0] for shape in shapes[:each])
    expected = (rows, *shapes[0][1:]) if experts is None else (experts, rows, *shapes[0][1:])
    alike = all(shape == shapes[i % each] and shape[1:] == shapes[0][1:] for i, shape in enumerate(shapes))
    if whole.shape != expected or not alike:
        return []
    starts = accumulate(map(prod, shapes[:-1]), initial=0)
    return [_run(whole, start, shape) for start, shape in zip(starts, shapes, strict=True)]


def _cut_inside(whole: TensorInfo, sources: Sequence[TensorInfo], dim: int) -> list[_Part]:
    """Return the parts of a tensor that is made of others, one behind the other along a dimension but the first.

    The others have all experts, for example: then each of the parts belongs to one expert. There are no parts if the
    shapes do not fit, or if there are too many.
    """
    outer, inner = whole.shape[:dim], whole.shape[dim + 1 :]
    lengths = [source.shape[dim] for source in sources if len(source.shape) > dim]
    fits = all(source.shape == (*outer, length, *inner) for source, length in zip(sources, lengths, strict=False))
    if len(lengths) < len(sources) or not fits or sum(lengths) != whole.shape[dim] or prod(outer) > MOST_OUTER:
        return []
    found, at = [], 0
    for number in range(prod(outer)):
        for source, length in zip(sources, lengths, strict=True):
            shape = (length, *inner)
            found.append(_Part(_run(whole, at, shape), _run(source, number * prod(shape), shape)))
            at += prod(shape)
    return found


def _run(tensor: TensorInfo, first: int, shape: tuple[int, ...]) -> TensorInfo:
    """Return the elements of a tensor from element `first` on that have this shape."""
    item = ITEMSIZE[tensor.dtype]
    start = tensor.start + first * item
    return TensorInfo(tensor.name, tensor.dtype, shape, start, start + prod(shape) * item)
