"""A checkpoint's tensors as the model in memory has them: transformers fuses some of them as it loads a model.

The experts of a layer, for example, are one tensor in memory and one tensor each in published files. The table of
layouts says which tensors of the files make one in memory. All of its operations are views, so no number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layouts import Fusion, Layout, find_layouts
from ..checkpoints.naming import unwrap
from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import ITEMSIZE, torch_dtypes
from .model_weights import ModelInMemory
from .originals import ReadTensor


class _Assembly(NamedTuple):
    """The tensors of a checkpoint that make a tensor in memory.

    Attributes:
        fusion: The conversion.
        parts: The tensors of the experts for each source of the conversion, or one tensor for each source.
        target: The number of the tensor in memory among those that the conversion gives.
    """

    fusion: Fusion
    parts: tuple[tuple[TensorInfo, ...], ...]
    target: int

    def assemble(self, load: Callable[[TensorInfo], torch.Tensor]) -> torch.Tensor:
        """Return the tensor in memory, with the parts that `load` returns."""
        columns = [[load(part) for part in source] for source in self.parts]
        if self.fusion.stacks:
            _, dim = next(each for each in self.fusion.operations if each[0] == "stack")
            tensors = [torch.stack(column, dim) for column in columns]
        else:
            tensors = [column[0] for column in columns]
        for verb, *dims in self.fusion.operations:
            if verb == "concatenate":
                tensors = [torch.cat(tensors, dims[0])]
            elif verb == "transpose":
                tensors = [tensor.transpose(*dims) for tensor in tensors]
            elif verb == "chunk":
                tensors = list(torch.chunk(tensors[0], len(self.fusion.targets), dims[0]))
        return tensors[self.target]


def fuse_like(checkpoint: Checkpoint, read: ReadTensor, model: ModelInMemory) -> tuple[Checkpoint, ReadTensor]:
    """Return a checkpoint with the fused tensors of a model, and the function that reads bytes of its tensors.

    Tensors stay as they are in the files if the model does not have the fused tensor in the same shape.

    Args:
        checkpoint: The checkpoint.
        read: Reads bytes of its tensors.
        model: The model.
    """
    configs = [config for config in (model.config, checkpoint.config) if config.get("model_type")]
    layout = next(iter(find_layouts(*configs)), None) if configs else None
    if layout is None or not layout.fusions:
        return checkpoint, read
    assemblies = _find_assemblies(checkpoint.tensors, model.tensors, layout)
    used = {part.name for assembly in assemblies.values() for source in assembly.parts for part in source}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in used}
    for name, assembly in assemblies.items():
        dtype, shape = assembly.parts[0][0].dtype, model.tensors[name].shape
        tensors[name] = TensorInfo(name, dtype, shape, 0, element_count(shape) * ITEMSIZE[dtype])
    return replace(checkpoint, tensors=tensors), _read_fused(read, assemblies)


def _find_assemblies(
    tensors: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], layout: Layout
) -> dict[str, _Assembly]:
    """Return the assembly of each tensor in memory that complete sets of a checkpoint's tensors make.

    Args:
        tensors: The tensors of the checkpoint by name.
        wanted: The tensors in memory by name.
        layout: The conversions of the model.
    """
    names = {unwrap(name): name for name in wanted}
    found: dict[tuple[Fusion, tuple[str, ...]], dict[tuple[int, int], TensorInfo]] = {}
    for name, tensor in tensors.items():
        place = layout.find_place(layout.rename(name))
        if place is not None and name not in wanted and all(target in names for target in place.targets):
            parts = found.setdefault((place.fusion, place.targets), {})
            parts[place.source, place.expert] = tensor
    assemblies: dict[str, _Assembly] = {}
    for (fusion, targets), parts in found.items():
        experts = range(max(expert for _, expert in parts) + 1)
        complete = [(source, expert) for source in range(len(fusion.sources)) for expert in experts]
        dtypes = {part.dtype for part in parts.values()}
        if sorted(parts) != complete or len(dtypes) > 1 or not dtypes <= set(ITEMSIZE):
            continue
        ordered = tuple(tuple(parts[source, expert] for expert in experts) for source in range(len(fusion.sources)))
        made = {names[target]: _Assembly(fusion, ordered, number) for number, target in enumerate(targets)}
        if all(_shape_of(assembly) == wanted[name].shape for name, assembly in made.items()):
            assemblies |= made
    return assemblies


def _shape_of(assembly: _Assembly) -> tuple[int, ...] | None:
    """Return the shape of the assembled tensor; None if the parts do not fit together."""
    try:
        return tuple(assembly.assemble(lambda part: torch.empty(part.shape, device="meta")).shape)
    except (RuntimeError, IndexError):
        return None


def _read_fused(read: ReadTensor, assemblies: Mapping[str, _Assembly]) -> ReadTensor:
    """Return a function that reads bytes of a checkpoint's tensors and of the assembled ones.

    The tensor that was assembled last stays in memory, because a tensor is read in several parts.
    """

    def load(part: TensorInfo) -> torch.Tensor:
        memory = torch.empty(part.nbytes, dtype=torch.uint8)
        read(part.name, part.start, memory.numpy().data)
        return memory.view(torch_dtypes()[part.dtype]).view(part.shape)

    @lru_cache(maxsize=1)
    def assembled(name: str) -> torch.Tensor:
        return assemblies[name].assemble(load).contiguous().reshape(-1).view(torch.uint8)

    def read_either(name: str, start: int, into: memoryview) -> None:
        if name in assemblies:
            torch.frombuffer(into, dtype=torch.uint8).copy_(assembled(name)[start : start + len(into)])
        else:
            read(name, start, into)

    return read_either
