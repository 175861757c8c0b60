"""A checkpoint on disk, read-only: one weight file, or a folder with one file or with shards and an index.

Weight files are .safetensors, or PyTorch's .bin (see pickled.py). Opening reads headers alone. Tensor bytes are reached
through each shard's reader, which opens the file when asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import CheckpointError
from .reader import Bytes, Identity, Reader, opened
from .safetensors_header import Header, TensorInfo, header_length, parse

if TYPE_CHECKING:
    from .lora import Adapter

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE_BIN = "pytorch_model.bin"
INDEX_BIN = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_BIN = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth")  # what a file of PyTorch's own format may end in
MAX_JSON = 100_000_000  # bytes of an index or a config


class WeightFile(Protocol):
    """A file with tensors: what is known of it before any of their bytes are read.

    path; size in bytes; header: its tensors. digest: of all that says where they are. reader: of the file's bytes.
    readers: of the tensors whose bytes do not lie in the file as TensorInfo has it, by name.
    """

    path: str
    size: int
    header: Header
    digest: str
    reader: Reader

    @property
    def readers(self) -> Mapping[str, Bytes]: ...


class Shard:
    """One safetensors file: its header, and a reader of its bytes."""

    def __init__(self, path: str) -> None:
        """Read and check the header. Raises CheckpointError."""
        self.path = path
        try:
            with opened(path) as file:
                identity = Identity.of(file.fileno())
                first = file.read(64)
                if first.startswith(b"GGUF"):
                    raise CheckpointError(gguf(path))
                length = header_length(path, first, identity.size)
                file.seek(8)
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        self.size = identity.size
        self.header: Header = parse(path, text, self.size)
        self.digest = hashlib.sha256(text).hexdigest()
        self.reader = Reader(path, identity)
        self.readers: dict[str, Bytes] = {}


class Origin(NamedTuple):
    """Where a checkpoint comes from: a hub repository's id and the commit, or a local name and None."""

    name: str
    commit: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What the headers say: no tensor byte has been read.

    path: where it is. folder: None for a bare file. shards: by file name, in the order of the names.
    tensors: TensorInfo by name. weight_map: the name of each tensor's shard. config: config.json's object, {} if there
    is none. index: the index file's object, None without shards. files: every other regular file of the folder, by its
    relative path, sorted, and where it is. strays: those of them that are links out of the folder, and where they lead.
    origin: None where it is just a path.
    adapter: what turns these tensors into a checkpoint trained from them, for one that was saved as an adapter alone:
    then `tensors` are those of the checkpoint below it, but for the ones that the adapter has whole.
    stored: the name in the file of each tensor that has another name here, without what a wrapper had added.
    notes: what is odd about the files and does no harm.
    """

    path: str
    folder: str | None
    shards: Mapping[str, WeightFile]
    tensors: dict[str, TensorInfo]
    weight_map: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    adapter: Adapter | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of its hub id or path, without the suffix of a file: what an output is named after."""
        path = self.origin.name if self.origin else os.path.abspath(self.path)
        name, suffix = os.path.splitext(os.path.basename(path))
        return name if self.folder is None and suffix in (".safetensors", *PICKLED) else name + suffix

    @property
    def weight_files(self) -> dict[str, WeightFile]:
        """Every file whose tensors are read, by name."""
        own = {os.path.basename(self.adapter.shard.path): self.adapter.shard} if self.adapter else {}
        return {**self.shards, **own}

    def reader(self, tensor: str) -> Bytes:
        """Return the reader of the bytes [start, stop) of the tensor's TensorInfo."""
        if self.adapter is not None and tensor in self.adapter.full:
            shard = self.adapter.shard
            return shard.readers.get(self.tensors[tensor].name, shard.reader)
        file = self.shards[self.weight_map[tensor]]
        return file.readers.get(self.stored.get(tensor, tensor), file.reader)

    def close(self) -> None:
        for file in self.weight_files.values():
            file.reader.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a weight file, or a folder as transformers saves it.

    Where a folder has several forms of the weights, the one counts that transformers would take: .safetensors before
    .bin, and a single file before an index.
    Raises CheckpointError naming file, tensor and values.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise CheckpointError(f"{path or repr(path)}: {_missing(path)}")
        return _assemble(path, None, {os.path.basename(path): open_file(path)}, {}, None)
    config = load_json(os.path.join(path, CONFIG), missing={})
    for single, index in ((SINGLE, INDEX), (SINGLE_BIN, INDEX_BIN)):
        if os.path.exists(os.path.join(path, single)):
            return _assemble(path, path, {single: open_file(os.path.join(path, single))}, config, None)
        if os.path.exists(os.path.join(path, index)):
            return _open_sharded(path, config, index)
    raise CheckpointError(_nothing_to_read(path))


def open_file(path: str) -> WeightFile:
    """The tensors of a .safetensors or a .bin file. Raises CheckpointError."""
    if path.endswith(PICKLED):
        from .torch_file import PickledShard

        return PickledShard(path)
    return Shard(path)


def _open_sharded(folder: str, config: dict[str, Any], index_name: str) -> Checkpoint:
    where = os.path.join(folder, index_name)
    index = load_json(where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: no weight_map object that gives each tensor its file")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or name in (".", "..") or os.path.basename(name) != name:
            raise CheckpointError(
                f"{where}: tensor {tensor!r} is said to be in {name!r}, which is not a file name in this folder"
            )
    shards: dict[str, WeightFile] = {}
    for name in sorted(set(weight_map.values())):
        if not os.path.exists(os.path.join(folder, name)):
            raise CheckpointError(f"{where}: it names {name}, which is not in the folder; download it again")
        shards[name] = open_file(os.path.join(folder, name))
    checkpoint = _assemble(folder, folder, shards, config, index)
    return replace(checkpoint, notes=_compare_with_index(where, weight_map, checkpoint))


def _compare_with_index(where: str, weight_map: Mapping[str, str], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what is odd about an index but does no harm, as transformers reads all tensors of all shards.

    Raises:
        CheckpointError: The index gives a tensor to another shard than the one that has it.
    """
    found = checkpoint.weight_map
    absent = [tensor for tensor in weight_map if tensor not in found]
    for tensor, name in weight_map.items():
        if found.get(tensor, name) != name:
            raise CheckpointError(
                f"{where}: tensor {tensor!r} is said to be in {name}, but it is in {found[tensor]}; correct the entry, "
                "or load the model with transformers and save_pretrained() it again"
            )
    unnamed = [tensor for tensor in found if tensor not in weight_map]
    superseded = [
        tensor.name
        for name, shard in checkpoint.shards.items()
        for tensor in shard.header.tensors
        if found[tensor.name] != name
    ]
    kinds = (
        (absent, "is in the index and in no shard, so the model goes without it"),
        (unnamed, "is in a shard and not in the index; it counts, as transformers reads whole shards"),
        (superseded, "is in two shards; the one in the shard that the index names counts"),
    )
    return tuple(
        f"{where}: {names[0]!r} {what}" + f" ({len(names)} tensors are like that)" * (len(names) > 1)
        for names, what in kinds
        if names
    )


def _assemble(
    path: str, folder: str | None, shards: dict[str, WeightFile], config: dict[str, Any], index: dict[str, Any] | None
) -> Checkpoint:
    """Put the tensors of all shards together; of a tensor in two shards the later counts, if the index says so too."""
    tensors: dict[str, TensorInfo] = {}
    weight_map: dict[str, str] = {}
    said = index["weight_map"] if index else {}
    for name, shard in shards.items():
        for tensor in shard.header.tensors:
            if tensor.name in tensors and said.get(tensor.name) != name:
                raise CheckpointError(
                    f"{shard.path}: tensor {tensor.name!r} is also in {weight_map[tensor.name]}; transformers takes "
                    f"the one in {name}, but the index does not name that file for it; if it is the right one, let "
                    "the index say so"
                )
            tensors[tensor.name] = tensor
            weight_map[tensor.name] = name
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it")
    files = other_files(folder, {*shards, INDEX}) if folder else {}
    strays = strays_of(folder, files) if folder else {}
    return Checkpoint(path, folder, shards, tensors, weight_map, config, index, files, strays)


def strays_of(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    """Files that are links out of the folder, and where they lead; a hub cache's blobs belong to its snapshots."""
    home = os.path.realpath(folder)
    homes = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        homes.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    places = {name: os.path.realpath(path) for name, path in files.items()}
    inside = tuple(os.path.join(root, "") for root in homes)
    return {name: place for name, place in places.items() if not place.startswith(inside)}


def other_files(folder: str, weights: Collection[str]) -> dict[str, str]:
    """The regular files of a folder but for its weights, by their relative paths, sorted, and where they are."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(place, name) for name in names)
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]
    return {name: os.path.join(folder, name) for name in sorted(found) if name not in weights}


def load_json(path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; `missing` where there is no such file. Raises CheckpointError."""
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes, but at most {MAX_JSON} are read")
        with opened(path) as file:
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
    for name in (SINGLE, INDEX, SINGLE_BIN, INDEX_BIN):
        if name in names:  # and yet it does not exist
            return f"{os.path.join(folder, name)}: a broken link; download it again"
    if ADAPTER_CONFIG in names:
        return f"{folder}: a PEFT adapter; only --aligned may be one, over the checkpoint that --sft names"
    if any(name.startswith("adapter_model.") for name in names):
        return f"{folder}: a PEFT adapter without its {ADAPTER_CONFIG}; download it again"
    found = next((name for name in names if name.endswith(".gguf")), None)
    if found:
        return gguf(os.path.join(folder, found))
    other = next((name for name in names if name.endswith((*PICKLED, ".h5", ".msgpack", ".npz"))), None)
    hint = f"; load {other} with what wrote it, and save_pretrained() it with transformers" if other else ""
    return f"{folder}: none of {SINGLE}, {INDEX}, {SINGLE_BIN} and {INDEX_BIN} is in it{hint}"


def gguf(path: str) -> str:
    """What to say of a GGUF file."""
    name = os.path.basename(path)
    scheme = re.search(
        r"(?<![A-Za-z0-9])(I?Q[1-8](_[A-Z0-9]+)*|MXFP4|BF16|F16|F32)(?![A-Za-z0-9])", name, re.IGNORECASE
    )
    kind = (
        f"quantised as {scheme[0].upper()}" if scheme and "F" not in scheme[0].upper()[:2] else "most often quantised"
    )
    return (
        f"{path}: a GGUF file, {kind}, which cannot be extrapolated; use the checkpoint that it was made from, or load "
        f'it with transformers\' from_pretrained(folder, gguf_file="{name}") and save_pretrained() it'
    )
