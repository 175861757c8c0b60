"""The plan of a merge: every tensor's fate and every output byte's place, fixed before the first byte is written.

Pure: from two opened checkpoints and the options, with no I/O, no NumPy and no torch. A plan with `problems` is
complete enough to print, and must not be carried out.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .checkpoint import Checkpoint
from .errors import PlanError, UsageError
from .header import TensorInfo, emit
from .kernels.contract import ITEMSIZE, working_alpha

INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
POLICIES = ("error", "aligned")
MAX_ALPHAS = 64
OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx",
)  # fmt: skip
DIGESTS = "SHA256SUMS"
TRAINING = {"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}


class Action(str, Enum):
    """What happens to a tensor of aligned."""

    EXTRAPOLATE = "extrapolate"
    COPY = "copy"


class Rule(NamedTuple):
    """`--alpha-for`: tensors in whose name the pattern is found take this alpha in every output."""

    pattern: re.Pattern[str]
    alpha: float


class Step(NamedTuple):
    """One tensor of the output, with aligned's name, dtype and shape.

    reason: why, in words. alphas: one for each output; an alpha that is 0 in the tensor's arithmetic is a copy there.
    sft: its twin, None where the action is COPY.
    """

    name: str
    action: Action
    reason: str
    alphas: tuple[float, ...]
    aligned: TensorInfo
    sft: TensorInfo | None

    @property
    def active(self) -> list[int]:
        """The numbers of the outputs for which it is not a copy."""
        return [k for k, alpha in enumerate(self.alphas) if alpha]


class OutputShard(NamedTuple):
    """One file of the output: its first bytes, its size in bytes, and the steps in the order of their data."""

    name: str
    header: bytes
    size: int
    steps: tuple[tuple[Step, TensorInfo], ...]


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    alphas: one for each output; everything else is the same for all of them. steps: in aligned's order. dropped:
    tensors of sft alone. index: the index file's bytes, None without one. carried: aligned's other files that come
    along. left_out: (file, reason). problems: why the merge cannot be done; empty when it can.
    """

    alphas: tuple[float, ...]
    steps: tuple[Step, ...]
    dropped: tuple[str, ...]
    shards: tuple[OutputShard, ...]
    index: bytes | None
    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights of all outputs."""
        return sum(shard.size for shard in self.shards) * len(self.alphas)

    @property
    def input_bytes(self) -> int:
        """Bytes read from both inputs, each once."""
        return sum(step.aligned.nbytes + (step.sft.nbytes if step.sft else 0) for step in self.steps)

    def check(self) -> None:
        """Raise PlanError with every problem, if there is one."""
        if self.problems:
            raise PlanError("\n".join(self.problems))


def make_plan(
    sft: Checkpoint,
    aligned: Checkpoint,
    alphas: Sequence[float],
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
) -> Plan:
    """Pair the tensors of two checkpoints and lay out the output.

    alpha_for: regular expression (searched in the tensor's name) to the alpha used instead; the last match wins.
    on_unpaired, on_mismatch: "error", or "aligned" to keep aligned's tensor (and to drop one that sft alone has).
    Raises UsageError for an alpha, rule or policy that makes no sense; what the checkpoints make impossible is in
    `problems`.
    """
    rules = _check_arguments(alphas, alpha_for or {}, on_unpaired, on_mismatch)
    steps = []
    for name, tensor in aligned.tensors.items():
        own = next((rule.alpha for rule in reversed(rules) if rule.pattern.search(name)), None)
        steps.append(_step(tensor, sft.tensors.get(name), tuple(alphas) if own is None else (own,) * len(alphas)))
    dropped = tuple(name for name in sft.tensors if name not in aligned.tensors)
    problems = _model_problems(sft, aligned)
    problems += _tensor_problems(sft, aligned, dropped, on_unpaired, on_mismatch)
    for rule in rules:
        if not any(rule.pattern.search(name) for name in aligned.tensors):
            problems.append(f"--alpha-for {rule.pattern.pattern!r} matches no tensor of {aligned.path}")
    carried, left_out = sort_files(aligned.files)
    for name in carried:
        if name in aligned.strays:
            problems.append(
                f"{os.path.join(aligned.path, name)} is a link out of its folder, to {aligned.strays[name]}, and would "
                "be copied into the output: put a copy in its place, or remove it"
            )
    return Plan(
        tuple(alphas), tuple(steps), dropped, _lay_out(aligned, steps), _index(aligned), carried, left_out,
        tuple(problems),
    )  # fmt: skip


def _check_arguments(
    alphas: Sequence[float], alpha_for: Mapping[str, float], on_unpaired: str, on_mismatch: str
) -> list[Rule]:
    for value in (*alphas, *alpha_for.values()):
        try:
            working_alpha(value)
        except (ValueError, TypeError) as error:
            raise UsageError(f"alpha must be a number that is finite in float32, got {value!r}") from error
    if not 1 <= len(alphas) <= MAX_ALPHAS or len(set(alphas)) < len(alphas):
        raise UsageError(f"alphas must be 1 to {MAX_ALPHAS} different numbers, got {list(alphas)}")
    for option, policy in (("on_unpaired", on_unpaired), ("on_mismatch", on_mismatch)):
        if policy not in POLICIES:
            raise UsageError(f"{option} must be one of {', '.join(POLICIES)}, got {policy!r}")
    rules = []
    for pattern, alpha in alpha_for.items():
        try:
            if not isinstance(pattern, str):
                raise TypeError(f"it is a {type(pattern).__name__}")
            rules.append(Rule(re.compile(pattern), alpha))
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise UsageError(f"alpha_for {pattern!r} is not a regular expression: {error}") from error
    return rules


def _mismatch(aligned: TensorInfo, sft: TensorInfo) -> bool:
    return aligned.shape != sft.shape or (aligned.dtype in ITEMSIZE) != (sft.dtype in ITEMSIZE)


def _step(aligned: TensorInfo, sft: TensorInfo | None, alphas: tuple[float, ...]) -> Step:
    """A tensor's fate; `_tensor_problems` says which of these copies need the user's word first."""
    zeros = tuple(0.0 for _ in alphas)
    if sft is None:
        return Step(aligned.name, Action.COPY, "not in sft", zeros, aligned, None)
    if _mismatch(aligned, sft):
        return Step(aligned.name, Action.COPY, f"sft has {describe(sft)}", zeros, aligned, None)
    if aligned.dtype not in ITEMSIZE:
        return Step(aligned.name, Action.COPY, f"{aligned.dtype} is no floating-point dtype", zeros, aligned, None)
    working = tuple(alpha if working_alpha(alpha, aligned.dtype, sft.dtype) else 0.0 for alpha in alphas)
    if not any(working):
        reason = "alpha rounds to 0 in fp32" if any(alphas) else "alpha is 0"
        return Step(aligned.name, Action.COPY, reason, zeros, aligned, None)
    return Step(aligned.name, Action.EXTRAPOLATE, "", working, aligned, sft)


def _model_problems(sft: Checkpoint, aligned: Checkpoint) -> list[str]:
    problems = []
    for role, checkpoint in (("sft", sft), ("aligned", aligned)):
        scheme = checkpoint.config.get("quantization_config")
        if scheme:
            method = scheme.get("quant_method", "unknown") if isinstance(scheme, dict) else scheme
            problems.append(
                f"{role} {checkpoint.path} is quantised (quant_method {method}): its numbers cannot be extrapolated; "
                "use the checkpoint it was quantised from"
            )
    kinds = [checkpoint.config.get("model_type") for checkpoint in (sft, aligned)]
    if None not in kinds and kinds[0] != kinds[1]:
        problems.append(
            f"different architectures: sft {sft.path} is {kinds[0]!r}, aligned {aligned.path} is {kinds[1]!r}; "
            "extrapolation needs two checkpoints of one model"
        )
    return problems


def _tensor_problems(
    sft: Checkpoint, aligned: Checkpoint, dropped: tuple[str, ...], on_unpaired: str, on_mismatch: str
) -> list[str]:
    problems = []
    unsupported = [
        f"{role}'s {tensor.name} ({tensor.dtype})"
        for role, checkpoint in (("sft", sft), ("aligned", aligned))
        for tensor in checkpoint.tensors.values()
        if tensor.dtype not in ITEMSIZE and tensor.dtype not in INTEGERS
    ]
    unpaired = [f"{name} (aligned only)" for name in aligned.tensors if name not in sft.tensors]
    unpaired += [f"{name} (sft only)" for name in dropped]
    mismatched = [
        f"{name}: sft {describe(sft.tensors[name])}, aligned {describe(tensor)}"
        for name, tensor in aligned.tensors.items()
        if name in sft.tensors and _mismatch(tensor, sft.tensors[name])
    ]
    if unsupported:
        problems.append(_listing("of a dtype that cannot be extrapolated (quantised?)", "", unsupported))
    if unpaired and on_unpaired == "error":
        problems.append(_listing("without a twin", "--on-unpaired aligned keeps aligned's, drops sft's", unpaired))
    if mismatched and on_mismatch == "error":
        problems.append(
            _listing(
                "whose twin has another shape or kind of dtype", "--on-mismatch aligned keeps aligned's", mismatched
            )
        )
    return problems


def _listing(what: str, fix: str, items: Sequence[str]) -> str:
    count = f"{len(items)} tensor{'s' * (len(items) > 1)} {what}"
    return "\n  ".join([f"{count}; {fix}:" if fix else f"{count}:", *items])


def describe(tensor: TensorInfo) -> str:
    """`BF16 [4096, 32]`."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _lay_out(aligned: Checkpoint, steps: Sequence[Step]) -> tuple[OutputShard, ...]:
    """Aligned's files and assignment, with our header."""
    by_shard: dict[str, dict[str, Step]] = {name: {} for name in aligned.shards}
    for step in steps:
        by_shard[aligned.weight_map[step.name]][step.name] = step
    shards = []
    for name, members in by_shard.items():
        metadata = {"format": "pt", **aligned.shards[name].header.metadata}  # transformers wants to know the format
        header, placed = emit(((s.name, s.aligned.dtype, s.aligned.shape) for s in members.values()), metadata)
        size = len(header) + sum(tensor.nbytes for tensor in placed.values())
        shards.append(OutputShard(name, header, size, tuple((members[t.name], t) for t in placed.values())))
    return tuple(shards)


def _index(aligned: Checkpoint) -> bytes | None:
    if aligned.index is None:
        return None
    metadata = aligned.index.get("metadata")
    total = sum(tensor.nbytes for tensor in aligned.tensors.values())
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": dict(sorted(aligned.weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode("ascii")  # escaped as transformers does it


def sort_files(files: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Aligned's files other than its weights: those that come along, and (file, reason) of those that do not."""
    carried, left_out = [], []
    for path in files:
        base = os.path.basename(path)
        if base.startswith("."):
            left_out.append((path, "hidden"))
        elif base.endswith(OTHER_WEIGHTS):
            left_out.append((path, "weights in another form, or training state"))
        elif path == "README.md":
            left_out.append((path, "describes aligned, not the merge"))
        elif path == DIGESTS:
            left_out.append((path, "digests of aligned's files, not of the merge's"))
        elif base in TRAINING:
            left_out.append((path, "state of aligned's training"))
        elif os.path.dirname(path) and not base.endswith((".py", ".jinja")):
            left_out.append((path, "in a subfolder, and neither code nor a chat template"))
        else:
            carried.append(path)
    return tuple(carried), tuple(left_out)


class Piece(NamedTuple):
    """A run of one step's bytes in a chunk: [start, stop) of the tensor's own bytes, at `at` in the chunk."""

    step: Step
    start: int
    stop: int
    at: int


class Chunk(NamedTuple):
    """Bytes [start, stop) of an output shard, cut by bytes: part of a tensor, or many tensors, or header too."""

    shard: OutputShard
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def cut(plan: Plan, size: int) -> Iterator[Chunk]:
    """The output's chunks of `size` bytes, a multiple of 4096, so that no element straddles a cut."""
    for shard in plan.shards:
        first = 0  # the first tensor that reaches into the chunk
        for start in range(0, shard.size, size):
            stop = min(start + size, shard.size)
            pieces = []
            while first < len(shard.steps) and shard.steps[first][1].stop <= start:
                first += 1
            for step, placed in itertools.islice(shard.steps, first, None):
                if placed.start >= stop:
                    break
                low, high = max(placed.start, start), min(placed.stop, stop)
                if low < high:
                    pieces.append(Piece(step, low - placed.start, high - placed.start, low - start))
            yield Chunk(shard, start, stop, tuple(pieces))
