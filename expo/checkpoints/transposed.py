"""Present the transposed tensors of a checkpoint as another model has them.

Some published files have the experts of a layer transposed, under the names that the tensors have in memory: Qwen3-VL
MoE's `gate_up_proj` is [experts, hidden, 2 * intermediate] in the files and [experts, 2 * intermediate, hidden] in
memory. A square tensor has one shape in both forms; its neighbours in the same module, which are not square, show the
form. The table layouts.json says which names these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..dtypes import ITEMSIZE
from .checkpoint import Checkpoint
from .layouts import Layout, find_layouts
from .model_tensors import ModelTensors
from .naming import unwrap
from .reader import FileReader
from .safetensors_header import TensorInfo
from .strided_reader import StridedReader


def transposed_like(sft: Checkpoint, aligned: ModelTensors) -> Checkpoint:
    """Return sft with each tensor that has the other form in aligned transposed, which readers do as they read."""
    configs = [config for config in (aligned.config, sft.config) if config.get("model_type")]
    layout = next(iter(find_layouts(*configs)), None) if configs else None
    tensors: dict[str, TensorInfo] = {}
    views = {}
    for names, dims in _modules(sft.tensors, layout) if layout else ():
        pairs = [(sft.tensors[name], aligned.tensors[name]) for name in names if name in aligned.tensors]
        if all(one.shape == other.shape for one, other in pairs):
            continue
        if any(_swap(one.shape, dims) != other.shape or one.dtype not in ITEMSIZE for one, other in pairs):
            continue  # the plan refuses the shapes
        for one, _ in pairs:
            reader = sft.reader(one.name)
            if isinstance(reader, FileReader):
                shape = _swap(one.shape, dims)
                strides = _swap(_strides(one.shape), dims)
                axes = tuple(zip(shape, strides, strict=True))
                stored = sft.stored.get(one.name, one.name)
                views[stored] = StridedReader(reader, one.start, axes, ITEMSIZE[one.dtype])
                tensors[one.name] = TensorInfo(one.name, one.dtype, shape, 0, one.nbytes)
    if not tensors:
        return sft
    first = next(iter(tensors))
    note = f"{sft.path} has {len(tensors)} tensors transposed, such as {first}: they are read as aligned has them"
    return replace(sft, tensors=sft.tensors | tensors, views={**sft.views, **views}, notes=(*sft.notes, note))


def _modules(tensors: Mapping[str, TensorInfo], layout: Layout) -> Iterator[tuple[list[str], tuple[int, int]]]:
    """Yield the names of each module's tensors that are transposed in memory under their name, and the dimensions."""
    modules: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name, tensor in tensors.items():
        place = layout.find_place(layout.rename(name))
        if place is None or place.targets != (unwrap(name),) or len(place.fusion.operations) != 1:
            continue
        verb, *dims = place.fusion.operations[0]
        if verb == "transpose" and max(dims) < len(tensor.shape):
            modules.setdefault((name.rpartition(".")[0], (dims[0], dims[1])), []).append(name)
    for (_, swapped), names in modules.items():
        yield names, swapped


def _swap(values: tuple[int, ...], dims: tuple[int, int]) -> tuple[int, ...]:
    """Return the values with those of two dimensions exchanged."""
    swapped = list(values)
    swapped[dims[0]], swapped[dims[1]] = values[dims[1]], values[dims[0]]
    return tuple(swapped)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    strides: list[int] = []
    stride = 1
    for length in reversed(shape):
        strides.insert(0, stride)
        stride *= length
    return tuple(strides)
