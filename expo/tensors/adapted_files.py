"""A checkpoint with adapters as a model in memory needs it: each tensor that they change has the numbers of a merge."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoints.adapter import find_deltas, find_whole
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE
from ..execution.engines import choose
from ..execution.tensor_source import TensorSource
from ..planning.steps import Action, Deltas, Step
from .originals import ReadTensor, read_from_checkpoint


def with_merged_adapters(checkpoint: Checkpoint) -> tuple[Checkpoint, ReadTensor]:
    """Return a checkpoint without adapters that has their merged tensors, and the function that reads its tensors.

    A merged tensor is computed when it is read, with the bits that a merge at alpha 0 writes: the sum in fp32, rounded
    once to the base's dtype.
    """
    read = read_from_checkpoint(checkpoint)
    steps = {name: step for name in checkpoint.tensors if (step := _merge_step(checkpoint, name)) is not None}
    if not steps:
        return checkpoint, read
    source, engine = TensorSource(checkpoint, checkpoint), choose("auto", "cpu")

    def read_merged(name: str, start: int, into: memoryview) -> None:
        if name in steps:
            source.compute(engine, steps[name], start, start + len(into), [into])
        else:
            read(name, start, into)

    merged = {name: TensorInfo(name, step.dtype, step.shape, 0, step.nbytes) for name, step in steps.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **merged}, adapters=()), read_merged


def _merge_step(checkpoint: Checkpoint, name: str) -> Step | None:
    """Return the step that makes a tensor of the base and its deltas; None for a tensor that is stored as it is."""
    tensor, whole = checkpoint.tensors[name], find_whole(checkpoint.adapters, name)
    deltas = find_deltas(checkpoint.adapters, name)
    dtype = whole.base_dtypes[name] if whole else tensor.dtype
    if not deltas and (whole is None or dtype not in ITEMSIZE):
        return None
    return Step(name, Action.COPY, "", tensor, None, dtype, alphas=(0.0,), deltas=Deltas(deltas) if deltas else None)
