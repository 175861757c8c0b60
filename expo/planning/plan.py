"""Make the plan of a merge, which fixes the place of every output byte before the merge writes the first one.

The plan is made from two opened checkpoints and the options. A plan with problems can be printed, and must not be
carried out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sidecars import Code, sort_files
from ..dtypes import OUTPUT_DTYPES
from ..errors import UsageError
from ..options import MergeOptions
from .config import rewrite_config
from .matching import Matched, refuse
from .shards import PARTS_SHARD_BYTES, OutputShard, lay_out, make_index
from .steps import Action, Step, why_zero


@dataclass(frozen=True)
class Plan:
    """The plan of a merge.

    Attributes:
        alphas: One alpha for each output; the rest of the plan is the same for all outputs.
        steps: The steps in aligned's order, with alphas; the steps of one tensor follow each other.
        dropped: The reason for each tensor of sft that no step reads, by the tensor's name.
        shards: The weight files of one output.
        index: The bytes of the index file; None for an output without an index.
        rewritten: The new bytes of each file of aligned that the merge changes for the output, by the file's name.
        carried: The names of aligned's other files that the merge copies into the output.
        left_out: (name, reason) of each of aligned's files that the merge does not copy.
        problems: The reasons why the merge cannot be done; empty if it can.
        notes: Sentences that warn the user of something that does not prevent the merge.
    """

    alphas: tuple[float, ...]
    steps: tuple[Step, ...]
    dropped: dict[str, str]
    shards: tuple[OutputShard, ...]
    index: bytes | None
    rewritten: dict[str, bytes]
    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def extrapolated(self, k: int | None = None) -> int:
        """Return the number of tensors that are extrapolated, in part or whole, in output k (None: in any output)."""
        return len({step.name for step in self.steps if _is_extrapolated(step, k)})

    def copied(self, k: int | None = None) -> tuple[tuple[str, str], ...]:
        """Return (label, reason) of each step that is a copy in output k (None: in all outputs)."""
        return tuple(
            (step.label, step.reason if step.action is Action.COPY else why_zero(adapted=bool(step.deltas)))
            for step in self.steps
            if not _is_extrapolated(step, k)
        )

    @property
    def noted(self) -> tuple[tuple[str, str], ...]:
        """(label, remark) of each extrapolated step that has a remark for the user."""
        extrapolated = (step for step in self.steps if step.action is Action.EXTRAPOLATE)
        return tuple((step.label, step.reason) for step in extrapolated if step.reason)

    @property
    def output_bytes(self) -> int:
        """The number of bytes of the weight files of all outputs."""
        return sum(shard.size for shard in self.shards) * len(self.alphas)

    @property
    def input_bytes(self) -> int:
        """The number of bytes that the merge reads from both inputs."""
        return input_bytes(self.steps)

    def check(self) -> None:
        """Raise PlanError with the problems; do nothing if there is no problem."""
        refuse(self.problems)


def _is_extrapolated(step: Step, k: int | None) -> bool:
    """Return True if the step is extrapolated in output k (None: in any output)."""
    return any(step.alphas) if k is None else bool(step.alphas[k])


def input_bytes(steps: Iterable[Step]) -> int:
    """Return the number of bytes that the steps read from both inputs."""
    return sum(step.input_bytes for step in steps)


def plan_output(aligned: Checkpoint, matched: Matched, options: MergeOptions, code: Code | None = None) -> Plan:
    """Return the plan of a merge: the steps with alphas, and the files of an output.

    Args:
        aligned: The checkpoint whose files the output takes over.
        matched: The steps of aligned's tensors.
        options: The plan uses `alphas`, which must be set, `dtype`, `max_shard_size` and `carry`.
        code: The custom code among aligned's files; None if there is none.

    Raises:
        UsageError: An option needs several output files, and aligned is one bare file.
    """
    _check_bare_file(aligned, options)
    assert options.alphas is not None
    steps = matched.with_alphas(options.alphas)
    new_files = rewrite_config(aligned, steps, OUTPUT_DTYPES[options.dtype] if options.dtype else None)
    carried, left_out, unmet = sort_files(list(aligned.files), code, options.carry, aligned.path)
    carried = tuple(name for name in carried if name not in new_files)
    strays = [
        f"{aligned.files[name]} is a link out of its folder, to {aligned.strays[name]}, and the merge would copy that "
        "file into the output: put a copy of the file in the link's place, or remove the link"
        for name in carried
        if name in aligned.strays
    ]
    shard_bytes = options.shard_bytes or (PARTS_SHARD_BYTES if aligned.in_parts else None)
    shards = lay_out(aligned, steps, shard_bytes)
    return Plan(
        options.alphas, steps, matched.dropped, shards, make_index(aligned, shards, shard_bytes is not None),
        new_files, carried, left_out, (*matched.problems, *unmet, *strays), matched.notes,
    )  # fmt: skip


def _check_bare_file(aligned: Checkpoint, options: MergeOptions) -> None:
    """Raise UsageError if an option needs a folder and aligned is one bare file."""
    if aligned.folder is not None:
        return
    if options.shard_bytes is not None:
        raise UsageError(
            f"`max_shard_size={options.max_shard_size!r}` makes shards, but aligned {aligned.path} is one bare file"
        )
    if options.carry:
        raise UsageError(
            f"`carry` copies further files of aligned's folder, but aligned {aligned.path} is one bare file"
        )
