"""Compare what Live changes in a model in memory with what a merge changes in the files.

Names in memory may differ from those in the files: transformers, for example, fuses all experts of a layer into one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import ITEMSIZE, torch_dtypes
from ..planning.matching import Matched
from ..planning.pairing import pair
from ..planning.steps import Action, Step

SAMPLED_ELEMENTS = 1024  # elements at either end of a tensor that are compared to recognise it

# Why a weight would differ, or ""; and the dtype to which the judged weight must be rounded, or None.
Difference = tuple[str, torch.dtype | None]


class StepComparison(NamedTuple):
    """How the steps of a Live differ from the steps of the files.

    Attributes:
        differences: For each weight in memory that would differ from the merge's, the difference in words.
        rounded: Weights that the loader keeps in a wider dtype than the files, and the files' dtype, to which a merge
            rounds.
        wrong_elements: The number of elements of the weights that would differ.
        elements: The number of elements of all weights.
    """

    differences: dict[str, str]
    rounded: dict[str, torch.dtype]
    wrong_elements: int
    elements: int


def find_file_tensors(
    aligned: Checkpoint, memory: ModelTensors, weights: Mapping[str, torch.Tensor]
) -> dict[str, TensorInfo]:
    """Return aligned's tensor in the files for each weight in memory that was loaded from one tensor, unchanged.

    Args:
        aligned: The checkpoint that was loaded.
        memory: The tensors of the loaded model.
        weights: The loaded weights by name.
    """
    pairs = pair(aligned, memory)
    tensors = {name: counterpart.tensor for name, counterpart in pairs.counterparts.items()}
    tensors |= {name: aligned.tensors[name] for name in pairs.kept if name in aligned.tensors}
    return {name: tensor for name, tensor in tensors.items() if _is_equal(aligned, tensor, weights[name])}


def _is_equal(checkpoint: Checkpoint, tensor: TensorInfo, weight: torch.Tensor) -> bool:
    """Return True if a weight has the shape of a file's tensor, and the same elements at both ends.

    The shape alone does not suffice: a square matrix that was transposed has the same shape.
    """
    if tuple(weight.shape) != tensor.shape:
        return False
    if tensor.dtype not in torch_dtypes() or not tensor.nbytes:
        return True
    flat, item = weight.detach().reshape(-1), ITEMSIZE[tensor.dtype]
    count = min(SAMPLED_ELEMENTS, len(flat))
    for start in (0, len(flat) - count):
        raw = bytearray(count * item)
        checkpoint.reader(tensor.name).read(tensor.start + start * item, memoryview(raw))
        in_memory = flat[start : start + count].cpu()
        in_file = torch.frombuffer(raw, dtype=torch_dtypes()[tensor.dtype]).to(in_memory.dtype)
        if not torch.equal(in_memory.view(torch.uint8), in_file.view(torch.uint8)):
            return False
    return True


def compare_steps(
    files: Matched, live: Matched, file_tensors: Mapping[str, TensorInfo], by_files: bool
) -> StepComparison:
    """Return the differences between a merge of files and a Live.

    The loader may assemble one weight from several tensors of the files, such as fused experts. The judged model must
    then extrapolate the weight, with a counterpart from memory, and the merge must extrapolate all of these tensors:
    the loader rearranges sft and aligned in the same way, so the results agree.

    Args:
        files: The steps of the merge.
        live: The steps of the Live.
        file_tensors: The result of find_file_tensors().
        by_files: True if Live reads sft's tensors from files, by their names there; False if it has sft as a model.
    """
    file_steps, live_steps = _floating_steps(files), _floating_steps(live)
    matched = {tensor.name for tensor in file_tensors.values()}
    unmatched = [steps for name, steps in file_steps.items() if name not in matched and not _is_buffer(steps)]
    differences: dict[str, str] = {}
    rounded: dict[str, torch.dtype] = {}
    for name, steps in live_steps.items():
        own = file_steps.get(file_tensors[name].name) if name in file_tensors else None
        if own is not None:
            text, dtype = _compare_weight(own, steps, by_files)
        elif not unmatched:
            continue  # no tensor of the files can be its source
        else:
            text, dtype = _compare_assembled_weight(unmatched, steps, by_files)
        if text:
            differences[name] = text
        elif dtype is not None:
            rounded[name] = dtype
    sizes = {name: sum(element_count(step.shape) for step in steps) for name, steps in live_steps.items()}
    return StepComparison(differences, rounded, sum(sizes[name] for name in differences), sum(sizes.values()))


def _floating_steps(matched: Matched) -> dict[str, list[Step]]:
    """Return the steps of each floating-point tensor; tensors of other dtypes are copied in every case."""
    by_name: dict[str, list[Step]] = {}
    for step in matched.steps:
        if step.aligned.dtype in ITEMSIZE:
            by_name.setdefault(step.name, []).append(step)
    return by_name


def _is_buffer(steps: Iterable[Step]) -> bool:
    """Return True for a buffer that the model computes, although its files have it."""
    return all(step.reason.startswith("a buffer") for step in steps)


def _compare_weight(files: list[Step], live: list[Step], by_files: bool) -> Difference:
    """Return the difference between the steps of a weight in memory and the steps of its tensor in the files."""
    actions = [
        [(step.action, step.rows, step.sft.name if step.sft and by_files else "") for step in steps]
        for steps in (files, live)
    ]
    if actions[0] != actions[1]:
        return f"the merge {_describe(files)}, the judged model {_describe(live)}", None
    for in_file, in_memory in zip(files, live, strict=True):
        if in_memory.sft is not None and in_file.sft is not None:
            text, dtype = _compare_dtypes(
                (in_file.aligned.dtype, in_file.sft.dtype), (in_memory.aligned.dtype, in_memory.sft.dtype)
            )
            if text or dtype is not None:
                return text, dtype
    return "", None


def _describe(steps: list[Step]) -> str:
    """Return in words what happens to a tensor."""
    parts = []
    for step in steps:
        verb = "extrapolates" if step.action is Action.EXTRAPOLATE else f"copies aligned's ({step.reason})"
        parts.append(verb if step.rows is None else f"{verb} in rows {step.rows[0]} to {step.rows[1]}")
    return " and ".join(parts)


def _compare_assembled_weight(unmatched: list[list[Step]], live: list[Step], by_files: bool) -> Difference:
    """Return the difference for a weight that the loader assembles from several tensors of the files.

    Args:
        unmatched: The steps of each tensor of the files that is not one weight; the weight's sources are among them.
        live: The steps of the weight.
        by_files: As for compare_steps().
    """
    if by_files or len(live) > 1 or live[0].sft is None:
        return f"no tensor of aligned's files equals this weight, and the judged model {_describe(live)}", None
    partial = next((steps for steps in unmatched if len(steps) > 1 or steps[0].sft is None), None)
    if partial is not None:
        name = partial[0].name
        return f"it is made of several tensors of the files, of which the merge {_describe(partial)} {name}", None
    in_memory = live[0].aligned.dtype, live[0].sft.dtype
    in_files = {(steps[0].aligned.dtype, steps[0].sft.dtype) for steps in unmatched if steps[0].sft}
    if len(in_files) > 1:  # nothing shows which of them are the weight's sources
        known = in_memory in in_files
        return ("" if known else f"aligned and sft are {in_memory} in memory, {sorted(in_files)} in the files"), None
    return _compare_dtypes(in_files.pop(), in_memory)


def _compare_dtypes(in_files: tuple[str, str], in_memory: tuple[str, str]) -> Difference:
    """Return the difference that the dtypes of aligned and sft make.

    If the dtypes in memory are wider than those in the files, the formula gives the number that the merge then rounds.
    If they are narrower, it gives another number.

    Args:
        in_files: The dtypes of aligned and sft in the files.
        in_memory: The dtypes of aligned and sft in memory.
    """
    for role, file, memory in zip(("aligned", "sft"), in_files, in_memory, strict=True):
        if file != memory and (ITEMSIZE[file], memory) != (2, "F32"):
            return f"{role} is {file} in the files and {memory} in memory", None
    if in_files[0] == in_memory[0]:
        return "", None
    if in_files[1] == "F64":
        return f"{in_files[0]} in the files, {in_memory[0]} in memory, sft is F64", None
    return "", torch_dtypes()[in_files[0]]
