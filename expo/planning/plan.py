"""The plan of a merge: every tensor's fate and every output byte's place, fixed before the first byte is written.

Pure: the plan comes from two opened checkpoints and the options, without I/O, NumPy or torch. A plan with `problems` is
complete enough to print, and must not be carried out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sidecars import Code, sort_files
from ..dtypes import OUTPUT_DTYPES
from ..errors import UsageError
from ..options import MergeOptions
from .config import rewritten
from .matching import Matched, refuse
from .shards import OutputShard, index_of, lay_out
from .steps import Action, Step, why_zero


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        alphas: One alpha for each output; everything else is the same for all outputs.
        steps: The fates of the tensors in aligned's order, with alphas, those of one tensor together.
        dropped: The tensors of sft that no step reads, and the reason.
        shards: The files of one output that hold tensors.
        index: The bytes of the index file; None for an output without one.
        rewritten: The bytes of the files that the output needs otherwise than aligned has them, by name.
        carried: The names of aligned's other files that come along.
        left_out: (name, reason) of aligned's other files that stay behind.
        problems: Why the merge cannot be done; empty where it can.
        notes: Sentences about what a user should know of the output all the same.
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
        """Return how many tensors are extrapolated, in part or whole, in output k, or in any output for None."""
        return len({step.name for step in self.steps if _moves(step, k)})

    def copied(self, k: int | None = None) -> tuple[tuple[str, str], ...]:
        """Return (tensor or rows, reason) of what is copied into output k, or into all outputs for None."""
        return tuple(
            (step.label, step.reason if step.action is Action.COPY else why_zero(adapted=step.delta is not None))
            for step in self.steps
            if not _moves(step, k)
        )

    @property
    def noted(self) -> tuple[tuple[str, str], ...]:
        """(tensor, what a reader should know of it) of the tensors that are extrapolated."""
        found = ((step.label, step.reason) for step in self.steps if step.action is Action.EXTRAPOLATE)
        return tuple((name, reason) for name, reason in found if reason)

    @property
    def output_bytes(self) -> int:
        """Bytes of the weight files of all outputs."""
        return sum(shard.size for shard in self.shards) * len(self.alphas)

    @property
    def input_bytes(self) -> int:
        """Bytes that are read from both inputs, each once."""
        return input_bytes(self.steps)

    def check(self) -> None:
        """Raise PlanError with every problem, where there is one."""
        refuse(self.problems)


def _moves(step: Step, k: int | None) -> bool:
    return any(step.alphas) if k is None else bool(step.alphas[k])


def input_bytes(steps: Iterable[Step]) -> int:
    """Return the bytes that steps read from both inputs, each once."""
    return sum(step.input_bytes for step in steps)


def plan_output(aligned: Checkpoint, matched: Matched, options: MergeOptions, code: Code | None = None) -> Plan:
    """Add the files of an output to the fates of its tensors.

    Args:
        aligned: The checkpoint whose files the output takes over.
        matched: The fates of aligned's tensors.
        options: `alphas`, which must be set, `dtype`, `max_shard_size` and `carry` count here.
        code: The custom code among aligned's files.

    Raises:
        UsageError: An option asks for more than one file where aligned is one bare file.
    """
    _check_bare_file(aligned, options)
    assert options.alphas is not None
    steps = matched.at(options.alphas)
    new_files = rewritten(aligned, steps, OUTPUT_DTYPES[options.dtype] if options.dtype else None)
    carried, left_out, unmet = sort_files(list(aligned.files), code, options.carry, aligned.path)
    carried = tuple(name for name in carried if name not in new_files)
    strays = [
        f"{aligned.files[name]} is a link out of its folder, to {aligned.strays[name]}, and would "
        "be copied into the output: put a copy in its place, or remove it"
        for name in carried
        if name in aligned.strays
    ]
    shards = lay_out(aligned, steps, options.shard_bytes)
    return Plan(
        options.alphas, steps, matched.dropped, shards, index_of(aligned, shards, options.shard_bytes is not None),
        new_files, carried, left_out, (*matched.problems, *unmet, *strays), matched.notes,
    )  # fmt: skip


def _check_bare_file(aligned: Checkpoint, options: MergeOptions) -> None:
    """Raise UsageError where an option needs a folder and aligned is one bare file."""
    if aligned.folder is not None:
        return
    if options.shard_bytes is not None:
        raise UsageError(
            f"`max_shard_size={options.max_shard_size!r}` makes shards, but aligned {aligned.path} is one bare file"
        )
    if options.carry:
        raise UsageError(
            f"`carry` takes files along, but aligned {aligned.path} is one bare file: nothing comes with it"
        )
