"""compare(): the changes of a training, from two checkpoints.

One pass reads both checkpoints. With d = aligned - sft, and 2-norms over the elements whose d is finite:

    relative norm     = |d| / |aligned|, as merge() reports it
    1 - cosine        = (|d|^2 - (|aligned| - |sft|)^2) / (2 |aligned| |sft|)
    |aligned| - |sft| = (2 d.aligned - |d|^2) / (|aligned| + |sft|)

Two checkpoints of one model are so similar that 1 - (sft.aligned) / (|sft| |aligned|) would be rounding error. The
formulas above subtract no numbers near 1. The error of 1 - cosine is about 1e-6 of |d|^2 / (2 |aligned| |sft|), which
is the largest value that 1 - cosine can have for this |d|. Sums are taken over pieces with fixed bounds and added
exactly, so every run gives the same bits, whatever the number of threads. An adapter is added to its base in fp32 and
not rounded.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoints import tokenizer
from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError
from ..execution.tensor_source import TensorSource
from ..execution.worker_pool import Progress
from ..inputs.resolve import StrPath, complete_request, open_inputs
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..planning.shards import lay_out
from ..planning.steps import NOT_IN_SFT, ONLY_IN_SFT, Step
from .distance import DistanceSums, total
from .measurement import is_compared, measure_distances
from .pair_warnings import find_swap_evidence, find_warnings, model_name
from .places import OUTSIDE, Place, find_place, kind_rank, label_of
from .records import Comparison, Part, Tensor, make_part


def compare(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    *,
    recipe: str | None = None,
    base: StrPath | None = None,
    adapter_over: str | None = None,
    on_unpaired: str = "aligned",
    on_mismatch: str = "rows",
    progress: Progress | None = None,
    quiet: bool = True,
) -> Comparison:
    """Measure how far aligned is from sft: in each tensor, in each layer and in all.

    The memory is bounded, whatever the size of the models. Neither a GPU nor torch is used.

    Args:
        sft: As for merge().
        aligned: As for merge().
        recipe: As for merge().
        base: As for merge().
        adapter_over: As for merge().
        on_unpaired: "aligned" to list a tensor that one checkpoint alone has, "error" to refuse it.
        on_mismatch: "rows" to compare the common rows of two tensors that differ in the number of rows, and to list
            tensors whose shapes differ otherwise; "aligned" to list all of them; "error" to refuse them.
        progress: Called in this thread with (bytes read, bytes to read).
        quiet: True to download without progress bars.

    Raises:
        UsageError: An argument makes no sense.
        CheckpointError: A checkpoint cannot be read.
        PlanError: The checkpoints cannot be compared.
    """
    pair = complete_request(sft, aligned, 1.0, recipe, base, adapter_over)
    inputs = open_inputs(pair.sft, pair.aligned, quiet, base=pair.base, adapter_over=pair.adapter_over)
    with inputs as (sft_input, aligned_input):
        matched = _match(sft_input, aligned_input, on_unpaired, on_mismatch)
        source = TensorSource(sft_input, aligned_input)
        steps = matched.with_alphas((1.0,))
        shards = lay_out(aligned_input, steps, None)
        sums = measure_distances(steps, shards, source, progress or (lambda done, to_read: None))
        source.check()
        comparison = _assemble(_names(sft_input, aligned_input), matched, sums)
        warnings = _find_warnings(sft_input, aligned_input, comparison)
        return replace(comparison, warnings=warnings)


def _match(sft: Checkpoint, aligned: Checkpoint, on_unpaired: str, on_mismatch: str) -> Matched:
    """Return the pairs of tensors that are compared. Raises PlanError."""
    matched = match_tensors(sft, aligned, MergeOptions(on_unpaired=on_unpaired, on_mismatch=on_mismatch))
    if on_mismatch == "rows":
        # A merge refuses two shapes without common rows. A comparison lists them, so they are no problem here.
        match_tensors(sft, aligned, MergeOptions(on_unpaired=on_unpaired, on_mismatch="aligned")).check()
    else:
        matched.check()
    if not any(is_compared(step) for step in matched.steps):
        raise PlanError(f"nothing to compare: no floating-point tensor is in both {sft.path} and {aligned.path}")
    return matched


def _names(sft: Checkpoint, aligned: Checkpoint) -> tuple[str, str]:
    """Return the names of both checkpoints for a report: their paths if their names are the same."""
    names = model_name(sft), model_name(aligned)
    return names if names[0] != names[1] else (os.path.abspath(sft.path), os.path.abspath(aligned.path))


def _assemble(names: tuple[str, str], matched: Matched, sums: Mapping[str, DistanceSums]) -> Comparison:
    """Return the comparison without its warnings, from the sums of every tensor that was compared."""
    places = {name: find_place(name) for name in sums}
    steps = {step.name: step for step in reversed(matched.steps) if is_compared(step)}  # the first step of each tensor
    others = [step for step in matched.steps if not is_compared(step)]
    only_in_aligned = tuple((step.label, "only in aligned") for step in others if step.reason == NOT_IN_SFT)
    dropped = tuple(matched.dropped.items())
    return Comparison(
        sft=names[0],
        aligned=names[1],
        tensors=tuple(_make_tensor(steps[name], places[name], each) for name, each in sums.items()),
        layers=_group(sums, lambda name: places[name]._replace(kind="") if places[name].stack else places[name]),
        cells=_group({name: each for name, each in sums.items() if places[name].stack}, lambda name: places[name]),
        totals=make_part("all", Place("", None, ""), total(sums.values())),
        unpaired=(*only_in_aligned, *(item for item in dropped if item[1] == ONLY_IN_SFT)),
        not_compared=(
            *((step.label, step.reason) for step in others if step.reason != NOT_IN_SFT),
            *(item for item in dropped if item[1] != ONLY_IN_SFT),
        ),
        bytes_read=sum(step.input_bytes for step in matched.steps if is_compared(step)),
        warnings=(),
    )


def _find_warnings(sft: Checkpoint, aligned: Checkpoint, comparison: Comparison) -> tuple[str, ...]:
    """Return all warnings about a pair and its comparison."""
    warnings = [*find_swap_evidence(sft, aligned), *find_warnings(comparison)]
    note = tokenizer.compare(sft, aligned)
    if note is not None:
        warnings.append(f"{note.partition(': rows of the')[0]}; rows of the embeddings are compared by id")
    return tuple(warnings)


def _make_tensor(step: Step, place: Place, sums: DistanceSums) -> Tensor:
    """Return the result for the tensor of a step."""
    part = make_part(step.name, place, sums)
    rows = "" if step.rows is None else f"rows {step.rows[0]} to {step.rows[1] - 1}"
    sft_dtype = (step.sft or step.aligned).dtype
    note, shape = "; ".join(filter(None, [rows, step.reason])), step.whole or step.shape
    return Tensor(**vars(part), shape=shape, dtype=step.aligned.dtype, sft_dtype=sft_dtype, note=note)


def _group(sums: Mapping[str, DistanceSums], place_of: Callable[[str], Place]) -> tuple[Part, ...]:
    """Return one part for all tensors of a place: layers in the order of their numbers, then the other places."""
    groups: dict[Place, list[DistanceSums]] = defaultdict(list)
    for name, each in sums.items():
        groups[place_of(name)].append(each)
    stacks = list(dict.fromkeys(place.stack for place in groups if place.stack))

    def rank(place: Place) -> tuple[int, int, int, str]:
        if place.layer is None:
            return len(stacks), 0, OUTSIDE.index(place.kind), ""
        return stacks.index(place.stack), place.layer, kind_rank(place.kind), place.kind

    return tuple(make_part(label_of(place), place, total(groups[place])) for place in sorted(groups, key=rank))
