"""compare(): what training changed between two checkpoints.

One pass over both, with d = aligned - sft; norms are 2-norms over the elements whose d is finite:

    relative norm = |d| / |aligned|, as merge() reports it
    1 - cosine    = (|d|^2 - (|aligned| - |sft|)^2) / (2 |aligned| |sft|)
    |aligned| - |sft| = (2 d.aligned - |d|^2) / (|aligned| + |sft|)

Two checkpoints of one model are so alike that 1 - (sft.aligned) / (|sft| |aligned|) would be rounding error: here
nothing of the size of 1 is subtracted, and 1 - cosine is good to some 1e-6 of |d|^2 / (2 |aligned| |sft|), its largest
value for that |d|. Sums are taken over pieces with fixed bounds and added exactly: the same bits on every run, whatever
the number of threads. An adapter is added to its base in fp32 and not rounded.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoints import tokenizer as tokens
from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError
from ..execution.tensor_source import TensorSource
from ..execution.worker_pool import Progress
from ..inputs.resolve import StrPath, complete_request, open_inputs
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..planning.shards import lay_out
from ..planning.steps import NOT_IN_SFT, ONLY_IN_SFT, Step
from .distance import Sums, total
from .measuring import compared, measure
from .places import OUTSIDE, Place, kind_order, label, place
from .records import Comparison, Part, Tensor, part_of
from .suspicions import name_of, suspicions, swapped


def compare(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    *,
    recipe: str | None = None,
    on_unpaired: str = "aligned",
    on_mismatch: str = "rows",
    progress: Progress | None = None,
    quiet: bool = True,
) -> Comparison:
    """How far aligned is from sft, tensor by tensor, layer by layer and in all.

    sft, aligned, recipe: as merge() takes them. on_unpaired: "aligned" to list tensors that one of them has alone,
    "error" to refuse. on_mismatch: "rows" to compare the rows that both have where the numbers of rows differ and list
    what differs otherwise in shape, "aligned" to list all of these, "error" to refuse. progress(done, total): bytes
    read, called in this thread. quiet: download without progress bars.
    Memory is bounded whatever the size of the models; no GPU and no torch is used.
    Raises UsageError, CheckpointError, PlanError, all of them ExpoError.
    """
    want = complete_request(sft, aligned, 1.0, recipe)
    with open_inputs(want.sft, want.aligned, quiet) as (weak, strong):
        matched = _match(weak, strong, on_unpaired, on_mismatch)
        source = TensorSource(weak, strong)
        steps = matched.at((1.0,))
        found = measure(steps, lay_out(strong, steps, None), source, progress or (lambda done, total: None))
        source.check()
        return _comparison(weak, strong, matched, found)


def _match(sft: Checkpoint, aligned: Checkpoint, on_unpaired: str, on_mismatch: str) -> Matched:
    """Return the pairs of tensors that are compared. Raises PlanError."""
    # Tensors of two shapes without rows in common are listed, so they are no problem where "rows" is asked for.
    lenient = "aligned" if on_mismatch == "rows" else on_mismatch
    match_tensors(sft, aligned, MergeOptions(on_unpaired=on_unpaired, on_mismatch=lenient)).check()
    matched = match_tensors(sft, aligned, MergeOptions(on_unpaired=on_unpaired, on_mismatch=on_mismatch))
    if not any(compared(step) for step in matched.steps):
        raise PlanError(f"nothing to compare: no tensor of numbers is in both {sft.path} and {aligned.path}")
    return matched


def _comparison(weak: Checkpoint, strong: Checkpoint, matched: Matched, found: Mapping[str, Sums]) -> Comparison:
    places = {name: place(name) for name in found}
    steps = {step.name: step for step in matched.steps if compared(step)}
    tensors = tuple(_tensor(steps[name], places[name], sums) for name, sums in found.items())
    left = [step for step in matched.steps if not compared(step)]
    alone = tuple((step.label, "only in aligned") for step in left if step.reason == NOT_IN_SFT)
    dropped = tuple(matched.dropped.items())
    names = [name_of(each) for each in (weak, strong)]
    if names[0] == names[1]:
        names = [os.path.abspath(each.path) for each in (weak, strong)]
    result = Comparison(
        sft=names[0], aligned=names[1], tensors=tensors,
        layers=_groups(found, lambda name: places[name]._replace(kind="" if places[name].stack else places[name].kind)),
        cells=_groups({name: sums for name, sums in found.items() if places[name].stack}, lambda name: places[name]),
        totals=part_of("all", Place("", None, ""), total(found.values())),
        unpaired=(*alone, *(item for item in dropped if item[1] == ONLY_IN_SFT)),
        not_compared=(
            *((step.label, step.reason) for step in left if step.reason != NOT_IN_SFT),
            *(item for item in dropped if item[1] != ONLY_IN_SFT),
        ),
        bytes_read=sum(step.input_bytes for step in matched.steps if compared(step)), warnings=(),
    )  # fmt: skip
    note = tokens.difference(weak, strong)
    said = [*swapped(weak, strong), *suspicions(result)]
    if note is not None:
        said.append(f"{note.partition(': rows of the')[0]}; rows of the embeddings are compared by id")
    return replace(result, warnings=tuple(said))


def _tensor(step: Step, where: Place, sums: Sums) -> Tensor:
    part = part_of(step.name, where, sums)
    rows = "" if step.rows is None else f"rows {step.rows[0]} to {step.rows[1] - 1}"
    sft = (step.sft or step.aligned).dtype
    note = "; ".join(filter(None, [rows, step.reason]))
    return Tensor(**vars(part), shape=step.shape, dtype=step.aligned.dtype, sft_dtype=sft, note=note)


def _groups(found: Mapping[str, Sums], key: Callable[[str], Place]) -> tuple[Part, ...]:
    """Tensors of one place together; layers in the order of their numbers, then the others."""
    groups: dict[Place, list[Sums]] = defaultdict(list)
    for name, sums in found.items():
        groups[key(name)].append(sums)
    order = list(dict.fromkeys(where.stack for where in groups if where.stack))

    def rank(where: Place) -> tuple[int, int, int, str]:
        inside = where.layer is not None
        kind = kind_order(where.kind) if inside else OUTSIDE.index(where.kind)
        return (order.index(where.stack), where.layer or 0, kind, where.kind) if inside else (len(order), 0, kind, "")

    return tuple(part_of(label(where), where, total(groups[where])) for where in sorted(groups, key=rank))
