"""A checkpoint on disk, read-only: one .safetensors file, or a folder with one file or with shards and an index.

Opening reads headers alone. Tensor bytes are reached through each shard's reader, which opens the file when asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from .errors import CheckpointError
from .header import Header, TensorInfo, header_length, parse
from .reader import Identity, Reader

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 100_000_000  # bytes of an index or a config


class Shard:
    """One safetensors file: its header, and a reader of its bytes."""

    def __init__(self, path: str) -> None:
        """Read and check the header. Raises CheckpointError."""
        self.path = path
        try:
            with _reading(path) as file:
                identity = Identity.of(file.fileno())
                length = header_length(path, file.read(64), identity.size)
                file.seek(8)
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        self.size = identity.size
        self.header: Header = parse(path, text, self.size)
        self.digest = hashlib.sha256(text).hexdigest()  # of the header
        self.reader = Reader(path, identity)


@dataclass(frozen=True)
class Checkpoint:
    """What the headers say: no tensor byte has been read.

    path: as the user gave it. folder: None for a bare file. shards: by file name, in the order of the names.
    tensors: TensorInfo by name. weight_map: the name of each tensor's shard. config: config.json's object, {} if there
    is none. index: the index file's object, None without shards. files: every other regular file of the folder, as
    relative paths, sorted. strays: those of them that are links out of the folder, and where they lead.
    """

    path: str
    folder: str | None
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    weight_map: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] | None = None
    files: tuple[str, ...] = ()
    strays: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the path, without .safetensors: what an output is named after."""
        return os.path.basename(os.path.abspath(self.path)).removesuffix(".safetensors")

    def shard(self, tensor: str) -> Shard:
        return self.shards[self.weight_map[tensor]]

    def close(self) -> None:
        for shard in self.shards.values():
            shard.reader.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a .safetensors file, or a folder as transformers saves it.

    Where a folder has both a single file and an index, the single file counts, as it does for transformers.
    Raises CheckpointError naming file, tensor and values.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        config = _load_json(os.path.join(path, "config.json"), missing={})
        single, index = os.path.join(path, SINGLE), os.path.join(path, INDEX)
        if os.path.exists(single):
            return _assemble(path, path, {SINGLE: Shard(single)}, config, None)
        if os.path.exists(index):
            return _open_sharded(path, config, _load_json(index))
        raise CheckpointError(_nothing_to_read(path))
    if not os.path.exists(path):
        hint = "; hub ids are not fetched: download it first" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise CheckpointError(f"{path or repr(path)}: {_missing(path)}{hint}")
    return _assemble(path, None, {os.path.basename(path): Shard(path)}, {}, None)


def _open_sharded(folder: str, config: dict[str, Any], index: dict[str, Any]) -> Checkpoint:
    where = os.path.join(folder, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: no weight_map object that gives each tensor its file")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or name in (".", "..") or os.path.basename(name) != name:
            raise CheckpointError(
                f"{where}: tensor {tensor!r} is said to be in {name!r}, which is not a file name in this folder"
            )
    shards = {}
    for name in sorted(set(weight_map.values())):
        if not os.path.exists(os.path.join(folder, name)):
            raise CheckpointError(f"{where}: it names {name}, which is not in the folder; download it again")
        shards[name] = Shard(os.path.join(folder, name))
    checkpoint = _assemble(folder, folder, shards, config, index)
    for tensor, name in weight_map.items():
        found = checkpoint.weight_map.get(tensor, "none of the shards")
        if found != name:
            raise CheckpointError(f"{where}: tensor {tensor!r} is said to be in {name}, but it is in {found}")
    if len(checkpoint.weight_map) > len(weight_map):
        tensor, name = next(item for item in checkpoint.weight_map.items() if item[0] not in weight_map)
        raise CheckpointError(f"{os.path.join(folder, name)}: tensor {tensor!r} is not in {INDEX}")
    return checkpoint


def _assemble(
    path: str, folder: str | None, shards: dict[str, Shard], config: dict[str, Any], index: dict[str, Any] | None
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    weight_map: dict[str, str] = {}
    for name, shard in shards.items():
        for tensor in shard.header.tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{shard.path}: tensor {tensor.name!r} is also in {weight_map[tensor.name]}")
            tensors[tensor.name] = tensor
            weight_map[tensor.name] = name
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it")
    files = _other_files(folder, {*shards, INDEX}) if folder else ()
    strays = _strays(folder, files) if folder else {}
    return Checkpoint(path, folder, shards, tensors, weight_map, config, index, files, strays)


def _strays(folder: str, files: Sequence[str]) -> dict[str, str]:
    """Files that are links out of the folder, and where they lead; a hub cache's blobs belong to its snapshots."""
    home = os.path.realpath(folder)
    homes = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        homes.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    places = {name: os.path.realpath(os.path.join(folder, name)) for name in files}
    inside = tuple(os.path.join(root, "") for root in homes)
    return {name: place for name, place in places.items() if not place.startswith(inside)}


def _other_files(folder: str, weights: set[str]) -> tuple[str, ...]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(place, name) for name in names)
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]
    return tuple(sorted(set(found) - weights))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    """A regular file, open. Raises OSError, and CheckpointError for a FIFO, which would wait for a writer."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield file


def _load_json(path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes, but at most {MAX_JSON} are read")
        with _reading(path) as file:
            value = json.loads(file.read())
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__} where an object is expected")
    return value


def _missing(path: str) -> str:
    try:
        os.stat(path)
    except PermissionError as error:
        return error.strerror or str(error)
    except (OSError, ValueError):
        pass
    return "a broken link" if os.path.islink(path) else "no such file or folder"


def _nothing_to_read(folder: str) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    for name in (SINGLE, INDEX):
        if name in names:  # and yet it does not exist
            return f"{os.path.join(folder, name)}: a broken link; download it again"
    other = {
        "a PEFT adapter": "adapter_model.safetensors",
        "a PyTorch .bin checkpoint": ".bin",
        "a GGUF checkpoint": ".gguf",
    }
    for kind, suffix in other.items():
        found = next((name for name in names if name.endswith(suffix)), None)
        if found:
            return (
                f"{folder}: {kind} ({found}), which cannot be read; load it with transformers and "
                "save_pretrained() it, which writes safetensors"
            )
    return f"{folder}: neither {SINGLE} nor {INDEX} is in it"
