"""Read a distributed checkpoint of torch: a folder with `.metadata` and `.distcp` files.

`.metadata` is a pickle of the shapes and chunks of all tensors, and of the file, offset and length of each chunk; at
that place lies what torch.save writes for the one tensor. Nothing of the pickle is run. Source:
github.com/pytorch/pytorch, torch/distributed/checkpoint (metadata.py and filesystem.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..dtypes import FROM_TORCH
from ..errors import CheckpointError
from .piecewise_reader import Piece, StoredTensor
from .reader import FileReader, Identity, open_regular_file
from .safetensors_header import Header
from .shard import Shard
from .torch_file import place_tensors
from .torch_tensors import HOLDERS, View, read_view
from .torch_zip import read_zip
from .unpickler import DTYPES, MAX_PICKLE, Call, Object, PickleStream, Reference, Unpickler, are_naturals, kind_of

if TYPE_CHECKING:
    from hashlib import _Hash

METADATA = ".metadata"
APP = "app"  # the name that torch's examples give to the object with model and optimizer


class _Chunk(NamedTuple):
    """A stored piece of a tensor, and the bytes of its file that have it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class _Tensor(NamedTuple):
    """A tensor as the metadata describe it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[_Chunk]


def read_distributed(folder: str) -> tuple[dict[str, Shard], dict[str, StoredTensor]]:
    """Return the files, by name, and the weights in them; the state of an optimizer is left out.

    Raises:
        CheckpointError: The metadata or a file is damaged, or is missing.
    """
    digest = hashlib.sha256()
    where = os.path.join(folder, METADATA)
    described = _choose_weights(where, *_read_metadata(where, digest))
    shards: dict[str, Shard] = {}
    tensors = {name: StoredTensor(tensor.dtype, tensor.shape, []) for name, tensor in described.items()}
    by_file: dict[str, list[tuple[str, _Chunk]]] = {}
    for name, tensor in described.items():
        for chunk in tensor.chunks:
            by_file.setdefault(chunk.file, []).append((name, chunk))
    for file, chunks in sorted(by_file.items()):
        shards[file] = _open_file(os.path.join(folder, file), chunks, tensors, digest)
    return shards, tensors


def _open_file(
    path: str, chunks: list[tuple[str, _Chunk]], tensors: Mapping[str, StoredTensor], digest: _Hash
) -> Shard:
    """Open a file, and add its chunks to the tensors."""
    try:
        with open_regular_file(path) as file:
            identity = Identity.of(file.fileno())
            reader = FileReader(path, identity)
            for name, chunk in chunks:
                found: list[View] = []

                def read(path: str, top: Any, name: str = name, found: list[View] = found) -> list[View]:
                    if type(top) is not Call:
                        raise CheckpointError(f"{path}: a chunk of {name!r} is {kind_of(top)}, and no tensor")
                    found.append(read_view(path, name, top))
                    return found

                if chunk.start + chunk.length > identity.size:
                    raise CheckpointError(f"{path}: it ends inside of {name!r}: truncated; copy it again")
                views, places = read_zip(path, file, chunk.length, digest, read, chunk.start)
                part = place_tensors(path, identity, views, places, digest, reader)
                (info,), tensor = part.header.tensors, tensors[name]
                if (info.dtype, info.shape) != (tensor.dtype, chunk.sizes):
                    what = f"{info.dtype} {list(info.shape)} where its metadata say {tensor.dtype} {list(chunk.sizes)}"
                    raise CheckpointError(f"{path}: a chunk of {name!r} is {what}")
                tensor.pieces.append(Piece(chunk.offsets, chunk.sizes, part.reader_of(name), info.start))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; copy it again") from error
    return Shard(path, identity.size, Header((), {}), digest.hexdigest(), reader, {})


def _read_metadata(where: str, digest: _Hash) -> tuple[dict[str, _Tensor], dict[str, tuple[str, ...]]]:
    """Return all tensors by their flat names, and the path of each of them in nested dicts."""
    try:
        with open_regular_file(where) as file:
            stream = PickleStream(file, 0, min(Identity.of(file.fileno()).size, MAX_PICKLE), digest)
            top = Unpickler(where, stream, {}, objects=True).run()
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from error
    fields: list[Any] = [
        top.attribute(name) if type(top) is Object else None for name in ("state_dict_metadata", "storage_data")
    ]
    if not all(type(each) is dict for each in fields):
        raise CheckpointError(f"{where}: {kind_of(top)}, and no metadata of a distributed checkpoint")
    described, stored = fields
    places = dict(_place(where, *each) for each in stored.get(None, ()))
    tensors = {}
    for name, entry in described.items():
        if type(entry) is Object and entry.name.endswith(" TensorStorageMetadata"):
            tensors[name] = _tensor(where, name, entry, places)
    planned = top.attribute("planner_data")
    paths = {}
    for name in tensors:
        path = planned.get(name) if type(planned) is dict else None
        paths[name] = path if type(path) is tuple and all(type(each) is str for each in path) else (name,)
    return tensors, paths


def _place(where: str, key: Any, value: Any) -> tuple[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Return the name and offsets of a chunk, and its file, offset and length."""
    index: list[Any] = [key.attribute(name) if type(key) is Object else None for name in ("fqn", "offset")]
    place: list[Any] = [
        value.attribute(name) if type(value) is Object else None for name in ("relative_path", "offset", "length")
    ]
    known = type(index[0]) is str and type(place[0]) is str and are_naturals(tuple(place[1:]))
    if not known or not (index[1] is None or are_naturals(index[1])):
        raise CheckpointError(f"{where}: a place of a chunk that is not its name, offsets, file, offset and length")
    if os.path.basename(place[0]) != place[0] or place[0] in ("", ".", ".."):
        raise CheckpointError(f"{where}: {index[0]!r} is said to be in {place[0]!r}, which is no file of this folder")
    if value.attribute("transform_descriptors"):
        raise CheckpointError(f"{where}: {index[0]!r} is stored in a changed form, such as a compressed one")
    return (index[0], index[1] or ()), (place[0], place[1], place[2])


def _tensor(
    where: str, name: str, entry: Object, places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> _Tensor:
    """Return a tensor with the places of its chunks."""
    properties, shape, chunks = entry.attribute("properties"), entry.attribute("size"), entry.attribute("chunks")
    state = properties.state if type(properties) is Object else None
    dtype = state[0] if type(state) is tuple and state else properties.attribute("dtype") if state else None
    known = DTYPES.get(dtype.name, "") if type(dtype) is Reference else ""
    if known not in FROM_TORCH or not are_naturals(shape) or type(chunks) is not list:
        raise CheckpointError(f"{where}: {name!r} is described without a known dtype, a shape and chunks")
    found = []
    for chunk in chunks:
        offsets: Any = chunk.attribute("offsets") if type(chunk) is Object else None
        sizes: Any = chunk.attribute("sizes") if type(chunk) is Object else None
        if not are_naturals(offsets) or not are_naturals(sizes):
            raise CheckpointError(f"{where}: {name!r} has a chunk without offsets and sizes")
        if 0 in sizes:
            continue
        if (name, offsets) not in places:
            raise CheckpointError(f"{where}: the chunk of {name!r} at {list(offsets)} has no place in a file")
        found.append(_Chunk(offsets, sizes, *places[name, offsets]))
    return _Tensor(FROM_TORCH[known], shape, found)


def _choose_weights(
    where: str, tensors: Mapping[str, _Tensor], paths: Mapping[str, tuple[str, ...]]
) -> dict[str, _Tensor]:
    """Return the weights by name: the tensors of the dict named model, if there is one, or else all.

    Raises:
        CheckpointError: Several dicts may be the weights.
    """
    left = {paths[name]: tensor for name, tensor in tensors.items()}
    for holders in ((APP,), HOLDERS):
        found = [key for key in holders if any(path[0] == key and len(path) > 1 for path in left)]
        if len(found) > 1:
            raise CheckpointError(f"{where}: dicts named {' and '.join(map(repr, found))}, and one may be the weights")
        if found:
            left = {path[1:]: tensor for path, tensor in left.items() if path[0] == found[0] and len(path) > 1}
    return {".".join(path): tensor for path, tensor in left.items()}
