"""Read a checkpoint that each process of a training has saved a file of: `model_world_size_N_rank_R.pt`, as verl does.

Such a file is a state dict. Its values are DTensors, of which the file has the process's own part, or plain tensors,
which every process has as a whole. A DTensor is pickled with its placements, one for each dimension of the mesh of
processes: Shard(dim) gives each process along this dimension of the mesh a part as torch.chunk does, and Replicate
gives each of them the same. Source: github.com/pytorch/pytorch, torch/distributed/tensor (placement_types.py,
_dtensor_spec.py), and github.com/volcengine/verl, verl/utils/checkpoint/fsdp_checkpoint_manager.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .piecewise_reader import Piece, StoredTensor
from .reader import Identity, open_regular_file
from .safetensors_header import TensorInfo
from .shard import Shard
from .torch_file import place_tensors
from .torch_tensors import View, find_weights, read_view, tensor_error
from .torch_zip import read_zip
from .unpickler import Call, Object, Reference, are_naturals, kind_of

RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
DTENSOR = re.compile(r"torch\.distributed\.(_?tensor)\b.* DTensor")
FIX = "merge the parts with the trainer's own tool, and give the result"


class _Part(NamedTuple):
    """One process's part of a tensor.

    Attributes:
        shape: The shape of the whole tensor.
        placements: A dimension for Shard and None for Replicate, for each dimension of the mesh; () for a plain tensor.
        mesh: The shape of the mesh; () for a plain tensor.
    """

    shape: tuple[int, ...]
    placements: tuple[int | None, ...] = ()
    mesh: tuple[int, ...] = ()


def read_rank_files(folder: str, names: Sequence[str]) -> tuple[dict[str, Shard], dict[str, StoredTensor]]:
    """Return the files, by name, and the tensors in them.

    Args:
        folder: The path of the folder.
        names: The names in it.

    Raises:
        CheckpointError: A file is missing or damaged, or the parts of a tensor do not make a whole.
    """
    found = [(int(match[1]), int(match[2]), name) for name in names if (match := RANK_FILE.fullmatch(name))]
    worlds = {world for world, _, _ in found}
    if len(worlds) > 1:
        sizes = " and ".join(map(str, sorted(worlds)))
        raise CheckpointError(f"{folder}: parts of trainings with {sizes} processes: remove those of the older one")
    (world,) = worlds
    by_rank = {rank: name for _, rank, name in found}
    missing = [rank for rank in range(world) if rank not in by_rank]
    if missing or len(by_rank) > world:
        name = f"model_world_size_{world}_rank_{missing[0] if missing else max(by_rank)}.pt"
        what = f"{name} is missing" if missing else f"{name} is one of too many"
        raise CheckpointError(f"{folder}: {what}, and {world} processes have saved one file each; copy all of them")
    shards: dict[str, Shard] = {}
    tensors: dict[str, StoredTensor] = {}
    first: dict[str, _Part] = {}
    for rank in range(world):
        name = by_rank[rank]
        shards[name], parts = _open_rank(os.path.join(folder, name), world)
        if rank and set(parts) != set(first):
            other = sorted(set(parts) ^ set(first))[0]
            raise CheckpointError(f"{os.path.join(folder, name)}: {other!r} is not in the files of all processes")
        first = first or parts
        for info in shards[name].header.tensors:
            _add_piece(tensors, shards[name], info, parts[info.name], rank)
    return shards, tensors


def _add_piece(tensors: dict[str, StoredTensor], shard: Shard, info: TensorInfo, part: _Part, rank: int) -> None:
    """Add a process's part of a tensor, unless another process's part is the same.

    Raises:
        CheckpointError: The part does not have the shape that the placements give it.
    """
    stored = tensors.setdefault(info.name, StoredTensor(info.dtype, part.shape, []))
    if (stored.dtype, stored.shape) != (info.dtype, part.shape):
        raise tensor_error(shard.path, info.name, f"{info.dtype} {list(part.shape)}, and another one in other files")
    box = _box(part, rank)
    if box is None:
        return
    offsets, sizes = box
    if sizes != info.shape and not (0 in sizes and 0 in info.shape):
        what = f"a part of shape {list(info.shape)}, where its placements give {list(sizes)}; {FIX}"
        raise tensor_error(shard.path, info.name, what)
    if 0 not in sizes:
        stored.pieces.append(Piece(offsets, sizes, shard.reader_of(info.name), info.start))


def _box(part: _Part, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the offsets and sizes of a process's part; None if a process with a smaller rank has the same."""
    offsets, sizes = [0] * len(part.shape), list(part.shape)
    if not part.placements:
        return None if rank else (tuple(offsets), tuple(sizes))
    below = prod(part.mesh)
    for count, dim in zip(part.mesh, part.placements, strict=True):
        below //= count
        place, rank = divmod(rank, below)
        if dim is None:
            if place:
                return None
            continue
        chunk = -(-sizes[dim] // count)
        begin = min(place * chunk, sizes[dim])
        offsets[dim], sizes[dim] = offsets[dim] + begin, min(chunk, sizes[dim] - begin)
    return tuple(offsets), tuple(sizes)


def _open_rank(path: str, world: int) -> tuple[Shard, dict[str, _Part]]:
    """Return the file of one process, with the tensors that it stores, and the description of each by name."""
    parts: dict[str, _Part] = {}

    def read(path: str, top: Any) -> list[View]:
        views = []
        for name, value in find_weights(path, top).items():
            local = value
            if type(value) is Object:
                local, parts[name] = _read_distributed(path, name, value, world)
            if type(local) is not Call:
                raise tensor_error(path, name, f"it is {kind_of(local)}, and neither a tensor nor a DTensor; {FIX}")
            view = read_view(path, name, local)
            parts.setdefault(name, _Part(view.shape))
            views.append(view)
        return views

    digest = hashlib.sha256()
    try:
        with open_regular_file(path) as file:
            identity = Identity.of(file.fileno())
            views, places = read_zip(path, file, identity.size, digest, read)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return place_tensors(path, identity, views, places, digest), parts


def _read_distributed(path: str, name: str, value: Object, world: int) -> tuple[Any, _Part]:
    """Return the call that makes the local tensor of a DTensor, and the description of the DTensor.

    The object is _rebuild_from_type_v2(function, DTensor, (DTensor, dtype, size, ...), attributes); the attributes are
    a dict, or None and a dict of those in slots.
    """
    arguments = value.arguments
    kind = arguments[1] if len(arguments) == 4 else None
    state = arguments[3] if kind is not None else None
    state = state[1] if type(state) is tuple and len(state) == 2 else state
    if type(kind) is not Reference or not DTENSOR.fullmatch(kind.name) or type(state) is not dict:
        raise tensor_error(path, name, f"it is {kind_of(kind or value)}, and no DTensor; {FIX}")
    local, spec, made = state.get("_local_tensor"), state.get("_spec"), arguments[2]
    placements: Any = spec.attribute("placements") if type(spec) is Object else None
    shape: Any = made[2] if type(made) is tuple and len(made) > 2 else None
    if type(spec) is not Object or type(placements) is not tuple or not are_naturals(shape):
        raise tensor_error(path, name, f"a DTensor in a form that is not known; {FIX}")
    dims = tuple(_dimension(path, name, placement, len(shape)) for placement in placements)
    mesh = _mesh_shape(spec.attribute("mesh")) or ((world,) if len(dims) == 1 else ())
    if len(mesh) != len(dims) or prod(mesh) != world:
        what = f"{len(dims)} placements on a mesh of shape {list(mesh)}, and {world} processes have saved it; {FIX}"
        raise tensor_error(path, name, what)
    return local, _Part(shape, dims, mesh)


def _dimension(path: str, name: str, placement: Any, dims: int) -> int | None:
    """Return the dimension of Shard, and None for Replicate. Raises CheckpointError for any other placement."""
    kind = placement.name.rpartition(" ")[2] if type(placement) is Object else kind_of(placement)
    if kind == "Replicate":
        return None
    dim = placement.attribute("dim") if kind == "Shard" else None
    if type(dim) is not int or not 0 <= dim < dims:
        raise tensor_error(path, name, f"its placement is {kind}, and only Shard and Replicate are read; {FIX}")
    return dim


def _mesh_shape(mesh: Any) -> tuple[int, ...]:
    """Return the shape of a DeviceMesh in any of the forms that torch has pickled; () for another form."""
    if type(mesh) is not Object:
        return ()
    numbers = mesh.attribute("mesh")  # a tensor of ranks, in torch before 2.10
    if type(numbers) is Call and len(numbers.arguments) > 2 and are_naturals(numbers.arguments[2]):
        shape: tuple[int, ...] = numbers.arguments[2]
        return shape
    layout = mesh.attribute("_layout")
    if type(layout) is not Object:
        return ()
    axes = layout.attribute("axes")
    lengths = [_axis(axis) for axis in axes] if type(axes) is tuple else [layout.attribute("shape")]
    if type(axes) is not tuple and type(lengths[0]) is tuple:  # one layout for all dimensions
        lengths = list(lengths[0])
    return tuple(lengths) if are_naturals(tuple(lengths)) else ()


def _axis(axis: Any) -> Any:
    """Return the number of processes along one dimension of a mesh."""
    shape: Any = axis.attribute("shape") if type(axis) is Object else None
    return prod(shape) if are_naturals(shape) else shape
