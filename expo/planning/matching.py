"""Match the tensors of two models: find the pairs, and decide what happens to each tensor.

A merge, a stream, a live model, a search and a comparison all match tensors here. Only a merge has files, which
`plan.py` adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.adapter import find_deltas, find_whole
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.safetensors_header import TensorInfo, describe
from ..dtypes import ITEMSIZE, OUTPUT_DTYPES
from ..errors import PlanError
from ..kernels.contract import working_alpha
from ..options import MergeOptions
from .layout_runs import Run
from .pairing import Counterpart, mismatched, pair, rows_in_common
from .problems import float_bytes, model_problems, tensor_problems
from .steps import NOT_IN_SFT, ONLY_IN_SFT, SFT_HAS, UNTOUCHED, Action, Deltas, Step, some_rows, why_zero

MOST_LINES = 40  # the largest number of lines in an error's message


@dataclass(frozen=True)
class Matched:
    """The steps for the tensors of two models.

    Attributes:
        steps: One or two steps for each tensor of aligned, in aligned's order. The steps of one tensor follow each
            other, and have no alphas yet.
        dropped: The reason for each tensor of sft that no step reads, by the tensor's name.
        problems: The reasons why the two models cannot be merged; empty if they can. If there is a problem, the steps
            must not be carried out.
        notes: Sentences that warn the user of something that does not prevent the merge.
    """

    steps: tuple[Step, ...]
    dropped: dict[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def with_alphas(self, alphas: Sequence[float]) -> tuple[Step, ...]:
        """Return the steps with one alpha for each output."""
        return tuple(step.with_alphas(alphas) for step in self.steps)

    def check(self) -> None:
        """Raise PlanError if there is a problem."""
        refuse(self.problems)


def refuse(problems: Sequence[str]) -> None:
    """Raise PlanError with the problems, in at most MOST_LINES lines; do nothing if there is no problem."""
    lines = "\n".join(problems).splitlines()
    if len(lines) > MOST_LINES:
        rest = len(lines) - MOST_LINES + 1
        lines = [*lines[: MOST_LINES - 1], f"and {rest} more lines; python -m expo.fast --plan --json lists them all"]
    if lines:
        raise PlanError("\n".join(lines))


def match_tensors(sft: ModelTensors, aligned: ModelTensors, options: MergeOptions) -> Matched:
    """Pair the tensors of two models and decide what happens to each.

    Args:
        sft: The model that aligned was trained from.
        aligned: The model that gives the output its names, order and shapes.
        options: Matching uses `alpha_for`, `on_unpaired`, `on_mismatch` and `dtype`.

    Returns:
        The steps, and the problems that prevent a merge. This function raises no error for a problem.
    """
    pairs = pair(sft, aligned)
    steps: list[Step] = []
    for name, tensor in aligned.tensors.items():
        if name in pairs.kept:
            steps.append(_copy_step(name, tensor, tensor.dtype, pairs.kept[name]))
            continue
        counterpart = pairs.counterparts.get(name)
        dtype = _output_dtype(aligned, name, counterpart, options.dtype)
        if name in pairs.runs:
            new = [_run_step(tensor, run, dtype) for run in pairs.runs[name]]
        else:
            new = _steps_of((sft, aligned), name, counterpart, dtype, options.on_mismatch == "rows")
        steps += [_with_own_alpha(step, options.alpha_of(name)) for step in new]
    problems = model_problems(sft, aligned)
    problems += tensor_problems(sft, aligned, pairs, options.on_unpaired, options.on_mismatch)
    for rule in options.alpha_rules:
        if not any(rule.pattern.search(name) for name in aligned.tensors):
            problems.append(f"`alpha_for` {rule.pattern.pattern!r} matches no tensor of {aligned.path}")
    dropped = pairs.dropped | dict.fromkeys(pairs.only_in_sft, ONLY_IN_SFT)
    return Matched(tuple(steps), dropped, tuple(problems), _notes(sft, aligned, steps))


def _steps_of(
    models: tuple[ModelTensors, ModelTensors], name: str, counterpart: Counterpart | None, dtype: str, by_rows: bool
) -> list[Step]:
    """Return the steps of one tensor: two if the common rows are extrapolated and the other rows copied, else one.

    A tensor that cannot be extrapolated gets a copy. `tensor_problems` reports the tensor if no option allows the copy.

    Args:
        models: sft and aligned.
        name: The tensor's name in aligned.
        counterpart: The tensor's counterpart in sft; None if there is none.
        dtype: The safetensors name of the output's dtype.
        by_rows: True to extrapolate the common rows of two tensors that differ only in the number of rows.
    """
    tensor = models[1].tensors[name]
    if counterpart is None:
        return [_copy_step(name, tensor, dtype, NOT_IN_SFT)]
    summed = _adapters_step(models, name, counterpart, dtype) if models[1].adapters else None
    other = counterpart.tensor
    if summed is not None and (summed.sft is None or not mismatched(tensor, other) or summed.shares_base):
        return [summed]
    if not mismatched(tensor, other):
        return [_extrapolation_step(name, tensor, other, dtype, counterpart.reason)]
    common = rows_in_common(tensor, other) if by_rows else 0
    reason = f"{SFT_HAS}{describe(other)}"
    deltas = summed.deltas if summed else None
    copied = Deltas(deltas.aligned) if deltas and deltas.aligned else None
    if not common:
        return [_copy_step(name, tensor, dtype, reason)._replace(deltas=copied)]
    both = some_rows(tensor, 0, common), some_rows(other, 0, common)
    rows = tensor.shape[0]
    remark = "; ".join(filter(None, [counterpart.reason, reason]))
    first = _extrapolation_step(name, *both, dtype, remark)._replace(deltas=deltas)
    if common == rows:
        return [first]
    rest = _copy_step(name, some_rows(tensor, common, rows), dtype, reason)._replace(deltas=copied)
    return [first._replace(rows=(0, common)), rest._replace(rows=(common, rows))]


def _extrapolation_step(name: str, aligned: TensorInfo, sft: TensorInfo, dtype: str, reason: str) -> Step:
    """Return the step of a pair of one shape: an extrapolation, or a copy if the tensors have integers."""
    if aligned.dtype not in ITEMSIZE:
        return _copy_step(name, aligned, dtype, f"{aligned.dtype} is not a floating-point dtype")
    return Step(name, Action.EXTRAPOLATE, reason, aligned, sft, dtype)


def _run_step(tensor: TensorInfo, run: Run, dtype: str) -> Step:
    """Return the step of a run of a tensor of aligned. The first run of a tensor has the reason."""
    reason = run.reason if run.aligned.start == tensor.start else ""
    whole = None if run.aligned.shape == tensor.shape else tensor.shape
    return Step(tensor.name, Action.EXTRAPOLATE, reason, run.aligned, run.sft, dtype, whole=whole)


def _adapters_step(
    models: tuple[ModelTensors, ModelTensors], name: str, counterpart: Counterpart, dtype: str
) -> Step | None:
    """Return the step of a tensor to which adapters add deltas, or that they leave as it is.

    Returns:
        None if both tensors are stored as they are and differ, so that no delta takes part.
    """
    sft, aligned = models
    tensor, other = aligned.tensors[name], counterpart.tensor
    whole, other_whole = find_whole(aligned.adapters, name), find_whole(sft.adapters, other.name)
    own, theirs = find_deltas(aligned.adapters, name), find_deltas(sft.adapters, other.name)
    if whole is other_whole and own == theirs:
        return _copy_step(name, tensor, dtype, UNTOUCHED)._replace(deltas=Deltas(own) if own else None)
    if not own and not theirs:
        return None
    # Without an adapter of its own, sft is the base, also where it ties the tensor to another one.
    share_base = whole is other_whole and (tensor == other or not sft.adapters)
    deltas = Deltas(own, theirs, share_base)
    reason = _describe_deltas(deltas, bool(sft.adapters))
    return Step(name, Action.EXTRAPOLATE, reason, tensor, tensor if share_base else other, dtype, deltas=deltas)


def _describe_deltas(deltas: Deltas, two_adapters: bool) -> str:
    """Return the remark about the adapters that change a tensor."""
    new = [delta.rank for delta in deltas.aligned if delta not in deltas.sft]
    if not two_adapters:
        return f"adapter of rank {new[0]}"
    sides = (("sft", [delta.rank for delta in deltas.sft]), ("aligned", new))
    return " and ".join(f"{side}'s adapter of rank {ranks[0]}" for side, ranks in sides if ranks)


def _copy_step(name: str, tensor: TensorInfo, dtype: str, reason: str) -> Step:
    return Step(name, Action.COPY, reason, tensor, None, dtype)


def _with_own_alpha(step: Step, alpha: float | None) -> Step:
    """Return the step with the alpha that `alpha_for` gives it; a copy if this alpha is 0 in the step's arithmetic."""
    if step.sft is None or alpha is None:
        return step
    if working_alpha(alpha, step.aligned.dtype, step.sft.dtype):
        return step._replace(own_alpha=alpha)
    reason = why_zero(rounded=alpha != 0, adapted=bool(step.deltas))
    return step._replace(action=Action.COPY, reason=reason, sft=None)


def _output_dtype(aligned: ModelTensors, name: str, counterpart: Counterpart | None, dtype: str | None) -> str:
    """Return the safetensors name of the output tensor's dtype.

    A tensor that an adapter stores as a whole gets the dtype of the base, because the other tensors have that dtype.
    The values of a quantised tensor become bf16.
    """
    tensor = aligned.tensors[name]
    if tensor.dtype not in ITEMSIZE:
        return tensor.dtype
    if dtype is not None:
        return OUTPUT_DTYPES[dtype]
    if name in aligned.dequantized:
        return "BF16"
    whole = find_whole(aligned.adapters, name) if aligned.adapters else None
    in_base = whole.base_dtypes.get(name) if whole and counterpart is not None else None
    return in_base if in_base in ITEMSIZE else tensor.dtype


def _notes(sft: ModelTensors, aligned: ModelTensors, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the notes of both models and of their matching, each once."""
    own = [adapter.note for model in (sft, aligned) for adapter in model.adapters] + [_warn_of_copies(aligned, steps)]
    return tuple(dict.fromkeys((*sft.notes, *aligned.notes, *filter(None, own))))


def _warn_of_copies(aligned: ModelTensors, steps: Sequence[Step]) -> str | None:
    """Return a warning if `on_unpaired` and `on_mismatch` copy most floating-point bytes from aligned; else None."""
    if aligned.adapters:  # an adapter changes few tensors, so its merge may copy most of the model
        return None
    copied = [step for step in steps if step.action is Action.COPY]
    kept = float_bytes(step.aligned for step in copied if step.reason.startswith((NOT_IN_SFT, SFT_HAS)))
    total = float_bytes(step.aligned for step in steps)
    if 2 * kept <= total:
        return None
    return (
        f"{kept / total:.0%} of the floating-point bytes are copied from aligned and not extrapolated, because "
        "of `on_unpaired` or `on_mismatch`: check that sft and aligned are checkpoints of one model in the same form"
    )
