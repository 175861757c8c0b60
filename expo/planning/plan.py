"""The plan of a merge: every tensor's fate and every output byte's place, fixed before the first byte is written.

Pure: from two opened checkpoints and the options, with no I/O, no NumPy and no torch. A plan with `problems` is
complete enough to print, and must not be carried out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_header import TensorInfo, describe
from ..checkpoints.sidecars import Code, sort_files
from ..dtypes import ITEMSIZE, OUTPUT_DTYPES
from ..errors import PlanError, UsageError
from ..kernels.contract import working_alpha
from .config import rewritten
from .pairing import Twin, mismatched, pair, rows_in_common
from .problems import float_bytes, model_problems, tensor_problems
from .shards import OutputShard, index_of, joined, lay_out, size_of
from .steps import Action, Step, some_rows

if TYPE_CHECKING:
    from ..checkpoints.lora import Adapter

ON_UNPAIRED = ("error", "aligned")
ON_MISMATCH = ("error", "rows", "aligned")
NOT_IN_SFT, ONLY_IN_SFT, UNTOUCHED, SFT_HAS = "not in sft", "only in sft", "not in the adapter", "sft has "  # reasons
MAX_ALPHAS = 64
MOST_LINES = 40  # of an error's text


class Rules(NamedTuple):
    """The options that decide what an output holds; see make_plan for their meaning."""

    alpha_for: Mapping[str, float]
    on_unpaired: str
    on_mismatch: str
    dtype: str | None
    max_shard_size: str | int | None
    carry: Sequence[str] = ()

    def options(self) -> dict[str, Any]:
        """By their names on the command line."""
        return {f"--{name.replace('_', '-')}": value for name, value in self._asdict().items()}

    def chosen(self) -> dict[str, Any]:
        """Those that are not at their defaults, apart from --alpha-for and --carry, which are given several times."""
        plain = Rules({}, "error", "error", None, None).options()
        several = ("--alpha-for", "--carry")
        return {name: value for name, value in self.options().items() if name not in several and value != plain[name]}


class Rule(NamedTuple):
    """`--alpha-for`: tensors in whose name the pattern is found take this alpha in every output."""

    pattern: re.Pattern[str]
    alpha: float


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    alphas: one for each output; everything else is the same for all of them. steps: in aligned's order, those of one
    tensor together. dropped: tensors of sft alone, and why. index: the index file's bytes, None without one. made:
    files that are written anew, by name. carried: aligned's other files that come along. left_out: (file, reason).
    problems: why the merge cannot be done; empty when it can. notes: what to know of the output all the same.
    """

    alphas: tuple[float, ...]
    steps: tuple[Step, ...]
    dropped: dict[str, str]
    shards: tuple[OutputShard, ...]
    index: bytes | None
    made: dict[str, bytes]
    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def extrapolated(self, k: int | None = None) -> int:
        """Number of tensors that are, or rows of which are, in output k or in any."""
        return len({step.name for step in self.steps if (any(step.alphas) if k is None else step.alphas[k])})

    def copied(self, k: int | None = None) -> tuple[tuple[str, str], ...]:
        """(tensor, reason) of what is copied into output k, or into all; rows are named where it is not all of one."""
        return tuple(
            (step.label, step.reason if step.action is Action.COPY else _why_zero((0.0,), step.delta is not None))
            for step in self.steps
            if not (any(step.alphas) if k is None else step.alphas[k])
        )

    @property
    def noted(self) -> tuple[tuple[str, str], ...]:
        """(tensor, what is not plain about it) of those that are extrapolated."""
        found = ((step.label, step.reason) for step in self.steps if step.action is Action.EXTRAPOLATE)
        return tuple((name, reason) for name, reason in found if reason)

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights of all outputs."""
        return sum(shard.size for shard in self.shards) * len(self.alphas)

    @property
    def input_bytes(self) -> int:
        """Bytes read from both inputs, each once."""
        return sum(step.input_bytes for step in self.steps)

    def tensors(self) -> Iterator[tuple[TensorInfo, list[Step]]]:
        """Each tensor of the output, as if it began at byte 0, and the steps that make it, in aligned's order."""
        for name, group in itertools.groupby(self.steps, key=lambda step: step.name):
            steps = list(group)
            shape = joined([step.shape for step in steps])
            yield TensorInfo(name, steps[0].dtype, shape, 0, sum(step.nbytes for step in steps)), steps

    def check(self) -> None:
        """Raise PlanError with every problem, in at most MOST_LINES lines, if there is one."""
        lines = "\n".join(self.problems).splitlines()
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more lines; --plan --json has them"]
        if lines:
            raise PlanError("\n".join(lines))


def make_plan(
    sft: Checkpoint,
    aligned: Checkpoint,
    alphas: Sequence[float],
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    carry: Sequence[str] = (),
    code: Code | None = None,
) -> Plan:
    """Pair the tensors of two checkpoints and lay out the output.

    alpha_for: regular expression (searched in the tensor's name) to the alpha used instead; the last match wins.
    on_unpaired: "error", or "aligned" to keep aligned's tensor (and to drop one that sft alone has). on_mismatch:
    "error", "aligned" to keep aligned's tensor, or "rows" to extrapolate the rows that both have and keep the others.
    dtype: of the output's floating-point tensors: "bf16", "fp16" or "fp32"; None for aligned's own.
    max_shard_size: bytes of a file, or "5GB"; None for aligned's own files.
    carry: patterns (fnmatch) of aligned's files that come along beside those that a model is loaded with.
    code: the custom code among aligned's files.
    Raises UsageError for an alpha, rule or policy that makes no sense; what the checkpoints make impossible is in
    `problems`.
    """
    rules, most = check_arguments(alphas, alpha_for, on_unpaired, on_mismatch, dtype, max_shard_size, carry)
    if most is not None and aligned.folder is None:
        raise UsageError(f"max_shard_size {max_shard_size} makes shards, but aligned {aligned.path} is one bare file")
    if carry and aligned.folder is None:
        raise UsageError(f"carry takes files along, but aligned {aligned.path} is one bare file: nothing comes with it")
    pairs = pair(sft, aligned)
    steps: list[Step] = []
    for name, tensor in aligned.tensors.items():
        own = next((rule.alpha for rule in reversed(rules) if rule.pattern.search(name)), None)
        wanted = tuple(alphas) if own is None else (own,) * len(alphas)
        if name in pairs.kept:
            steps.append(_copy(name, tensor, tensor.dtype, pairs.kept[name], wanted))
        else:
            twin = pairs.twins.get(name)
            target = _output_dtype(aligned, name, twin, dtype)
            steps += _steps(name, aligned, twin, wanted, target, on_mismatch == "rows")
    problems = model_problems(sft, aligned)
    problems += tensor_problems(sft, aligned, pairs, on_unpaired, on_mismatch)
    for rule in rules:
        if not any(rule.pattern.search(name) for name in aligned.tensors):
            problems.append(f"--alpha-for {rule.pattern.pattern!r} matches no tensor of {aligned.path}")
    made = rewritten(aligned, steps, OUTPUT_DTYPES[dtype] if dtype else None)
    carried, left_out, unmet = sort_files(list(aligned.files), code, carry, aligned.path)
    carried = tuple(name for name in carried if name not in made)
    problems += unmet
    problems += [
        f"{aligned.files[name]} is a link out of its folder, to {aligned.strays[name]}, and would "
        "be copied into the output: put a copy in its place, or remove it"
        for name in carried
        if name in aligned.strays
    ]
    shards = lay_out(aligned, steps, most)
    return Plan(
        tuple(alphas), tuple(steps), pairs.dropped | dict.fromkeys(pairs.left, ONLY_IN_SFT), shards,
        index_of(aligned, shards, most is not None), made, carried, left_out, tuple(problems),
        _notes(sft, aligned, steps),
    )  # fmt: skip


def _notes(sft: Checkpoint, aligned: Checkpoint, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return what a user should know of an output that is written all the same."""
    adapted = aligned.adapter.note if aligned.adapter else None
    found = [adapted, _mostly_copied(aligned, steps)]
    return (*dict.fromkeys((*sft.notes, *aligned.notes)), *filter(None, found))


def _mostly_copied(aligned: Checkpoint, steps: Sequence[Step]) -> str | None:
    """Return a warning where the options, and not the tensors, leave most of the numbers as aligned has them."""
    if aligned.adapter is not None:  # an adapter leaves most tensors alone, and so should its merge
        return None
    copied = [step for step in steps if step.action is Action.COPY]
    kept = float_bytes(step.aligned for step in copied if step.reason.startswith((NOT_IN_SFT, SFT_HAS)))
    total = float_bytes(step.aligned for step in steps)
    if 2 * kept <= total:
        return None
    return (
        f"{kept / total:.0%} of the floating-point bytes are copied from aligned and not extrapolated, as "
        "--on-unpaired or --on-mismatch says: are sft and aligned saved in two forms, or two different models?"
    )


def check_arguments(
    alphas: Sequence[float],
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    carry: Sequence[str] = (),
) -> tuple[list[Rule], int | None]:
    """make_plan's arguments but for the checkpoints: the rules, and the bytes of a file. Raises UsageError."""
    alpha_for = alpha_for or {}
    for number in (*alphas, *alpha_for.values()):
        try:
            working_alpha(number)
        except (ValueError, TypeError) as error:
            raise UsageError(f"alpha must be a number that is finite in float32, got {number!r}") from error
    if not 1 <= len(alphas) <= MAX_ALPHAS or len(set(alphas)) < len(alphas):
        raise UsageError(f"alphas must be 1 to {MAX_ALPHAS} different numbers, got {list(alphas)}")
    choices: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("on_unpaired", on_unpaired, ON_UNPAIRED),
        ("on_mismatch", on_mismatch, ON_MISMATCH),
        ("dtype", "bf16" if dtype is None else dtype, OUTPUT_DTYPES),
    )
    for option, value, known in choices:
        if value not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(carry, str) or not all(isinstance(pattern, str) and pattern for pattern in carry):
        raise UsageError(f"carry must be a list of patterns, such as ['*.png'], got {carry!r}")
    rules = []
    for pattern, alpha in alpha_for.items():
        try:
            if not isinstance(pattern, str):
                raise TypeError(f"it is a {type(pattern).__name__}")
            rules.append(Rule(re.compile(pattern), float(alpha)))
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise UsageError(f"alpha_for {pattern!r} is not a regular expression: {error}") from error
    return rules, size_of(max_shard_size)


def _output_dtype(aligned: Checkpoint, name: str, twin: Twin | None, dtype: str | None) -> str:
    """Return the dtype of a tensor of the output; what an adapter keeps in a dtype of its own takes the base's."""
    tensor = aligned.tensors[name]
    if tensor.dtype not in ITEMSIZE:
        return tensor.dtype
    if dtype is not None:
        return OUTPUT_DTYPES[dtype]
    whole = aligned.adapter is not None and name in aligned.adapter.full
    return twin.tensor.dtype if whole and twin is not None and twin.tensor.dtype in ITEMSIZE else tensor.dtype


def _steps(
    name: str, aligned: Checkpoint, twin: Twin | None, alphas: tuple[float, ...], dtype: str, by_rows: bool
) -> list[Step]:
    """A tensor's fate; `problems.tensor_problems` says which of these copies need the user's word first."""
    tensor = aligned.tensors[name]
    if twin is None:
        return [_copy(name, tensor, dtype, NOT_IN_SFT, alphas)]
    if aligned.adapter is not None and name not in aligned.adapter.full:
        return [_adapted(name, aligned.adapter, tensor, alphas, dtype)]
    other = twin.tensor
    if not mismatched(tensor, other):
        return [_step(name, tensor, other, alphas, dtype, twin.reason)]
    common = rows_in_common(tensor, other) if by_rows else 0
    reason = f"{SFT_HAS}{describe(other)}"
    if not common:
        return [_copy(name, tensor, dtype, reason, alphas)]
    both = some_rows(tensor, 0, common), some_rows(other, 0, common)
    rows = tensor.shape[0]
    first = _step(name, *both, alphas, dtype, "; ".join(filter(None, [twin.reason, reason])))
    if common == rows:
        return [first]
    own = _copy(name, some_rows(tensor, common, rows), dtype, reason, alphas)
    return [first._replace(rows=(0, common)), own._replace(rows=(common, rows))]


def _step(name: str, aligned: TensorInfo, sft: TensorInfo, alphas: tuple[float, ...], dtype: str, reason: str) -> Step:
    if aligned.dtype not in ITEMSIZE:
        return _copy(name, aligned, dtype, f"{aligned.dtype} is no floating-point dtype", alphas)
    working = _working(alphas, aligned, sft)
    if not any(working):
        return _copy(name, aligned, dtype, _why_zero(alphas), alphas)
    return Step(name, Action.EXTRAPOLATE, reason, working, aligned, sft, dtype)


def _adapted(name: str, adapter: Adapter, base: TensorInfo, alphas: tuple[float, ...], dtype: str) -> Step:
    """A tensor that an adapter changes by a product of two small matrices, or leaves alone."""
    delta = adapter.low_rank.get(name)
    if delta is None:
        return _copy(name, base, dtype, UNTOUCHED, alphas)
    working = _working(alphas, base, base)
    step = Step(name, Action.EXTRAPOLATE, f"adapter of rank {delta.rank}", working, base, base, dtype, None, delta)
    if any(working):
        return step
    return step._replace(action=Action.COPY, sft=None, reason=_why_zero(alphas, True))


def _copy(name: str, tensor: TensorInfo, dtype: str, reason: str, alphas: tuple[float, ...]) -> Step:
    return Step(name, Action.COPY, reason, (0.0,) * len(alphas), tensor, None, dtype)


def _working(alphas: tuple[float, ...], aligned: TensorInfo, sft: TensorInfo) -> tuple[float, ...]:
    """The alphas, 0 where the tensors' arithmetic makes one 0."""
    return tuple(alpha if working_alpha(alpha, aligned.dtype, sft.dtype) else 0.0 for alpha in alphas)


def _why_zero(alphas: tuple[float, ...], adapted: bool = False) -> str:
    return ("alpha rounds to 0 in fp32" if any(alphas) else "alpha is 0") + ": base and adapter" * adapted
