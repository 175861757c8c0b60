"""A checkpoint on disk, read-only: one weight file, or a folder with one file or with shards and an index.

Opening a checkpoint reads headers alone. Tensor bytes are reached through the reader of each shard, which opens the
file at the first read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError
from .adapter import Adapter, find_whole
from .files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    INDEX_BIN,
    SINGLE,
    SINGLE_BIN,
    WHOLE_MODELS,
    find_other_files,
    find_strays,
    load_json,
)
from .index_check import compare_with_index
from .weight_files import PICKLED, gguf_message, open_shard

if TYPE_CHECKING:
    from .parts import Parts
    from .reader import ByteReader
    from .safetensors_header import TensorInfo
    from .shard import Shard


class Origin(NamedTuple):
    """The place that a checkpoint comes from: the id of a hub repository and the commit, or a local name and None."""

    name: str
    commit: str | None = None


class CommonBase(NamedTuple):
    """The base of two adapters.

    Attributes:
        name: The base as the user named it.
        origin: The place that the base comes from.
        adapter_over: "base" if aligned's adapter was trained on the base, "sft" if it was trained on the model that
            sft's adapter makes.
        reason: The end of a sentence that says what shows this.
    """

    name: str
    origin: Origin
    adapter_over: str
    reason: str

    @property
    def sentence(self) -> str:
        """Return the sentence about the model that aligned's adapter was trained on."""
        model = "the base" if self.adapter_over == "base" else "the model that sft's adapter makes of the base"
        return f"aligned's adapter was trained on {model}, {self.reason}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers and JSON files describe it.

    Attributes:
        path: Path of the folder or of the file.
        folder: Path of the folder; None for a file without one.
        shards: The shards by file name, in the order of the names.
        tensors: The tensors by name. With adapters, a tensor that was trained as a whole is the last adapter's that has
            it, and every other one is the base's.
        weight_map: The file name of each tensor's shard.
        config: The object in config.json; {} if there is no such file.
        index: The object in the index file; None without an index.
        files: The path of every other regular file of the folder, sorted by the path inside the folder.
        strays: The place that a link leads to, for each of these files that is a link out of the folder.
        origin: The place that the checkpoint comes from; None if that is the path alone.
        adapters: The adapters whose deltas turn these tensors into the trained checkpoint, each trained on the model
            that the adapters before it make; () for a checkpoint saved as a whole.
        common_base: The base that both inputs are adapters over; None for all other inputs.
        stored: The name of a tensor in its file, for each tensor that has another name here: the file has a wrapper's
            longer name, or the head is stored in the file only as the embedding.
        notes: Sentences for the user about oddities of the files that do no harm.
        views: The reader of each tensor whose numbers are not stored as its TensorInfo says, by its stored name.
        dequantized: The names of the tensors whose numbers are computed from quantised ones.
        in_parts: True if the processes of a training saved the weights in parts, which transformers does not load.
        config_changed: True if `config` is not the object in config.json, because it lost an entry.
    """

    path: str
    folder: str | None
    shards: Mapping[str, Shard]
    tensors: dict[str, TensorInfo]
    weight_map: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    adapters: tuple[Adapter, ...] = ()
    common_base: CommonBase | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    views: Mapping[str, ByteReader] = field(default_factory=dict)
    dequantized: frozenset[str] = frozenset()
    config_changed: bool = False
    in_parts: bool = False

    @property
    def name(self) -> str:
        """Return the last part of the hub id or path, without a file's suffix; outputs are named after it."""
        path = self.origin.name if self.origin else os.path.abspath(self.path)
        name, suffix = os.path.splitext(os.path.basename(path))
        return name if self.folder is None and suffix in (".safetensors", *PICKLED) else name + suffix

    @property
    def weight_files(self) -> dict[str, Shard]:
        """Return all shards by file name, and the adapters' weight files among them."""
        own = {}
        for below, adapter in enumerate(reversed(self.adapters)):
            own["adapter below: " * below + os.path.basename(adapter.shard.path)] = adapter.shard
        return {**self.shards, **own}

    def reader(self, tensor: str) -> ByteReader:
        """Return the reader of the bytes [start, stop) of a tensor's TensorInfo, by the tensor's name."""
        whole = find_whole(self.adapters, tensor) if self.adapters else None
        if whole is not None:
            return whole.shard.reader_of(whole.full[tensor].name)
        stored = self.stored.get(tensor, tensor)
        return self.views.get(stored) or self.shards[self.weight_map[tensor]].reader_of(stored)

    @property
    def is_scattered(self) -> bool:
        """True if the elements of a tensor are spread over its file."""
        stored = (reader for shard in self.shards.values() for reader in shard.readers.values())
        return any(reader.scattered for reader in (*self.views.values(), *stored))

    def close(self) -> None:
        """Close all files."""
        for shard in self.weight_files.values():
            shard.reader.close()


def open_checkpoint(path: str | os.PathLike[str], has_data: bool = True) -> Checkpoint:
    """Read the headers of a checkpoint: a weight file, or a folder as transformers saves it.

    If a folder has the weights in several forms, the form counts that transformers takes: .safetensors before .bin, and
    a single file before an index.

    Args:
        path: The path of the file or of the folder.
        has_data: False if the weight files have headers and no data, as a stand-in's have.

    Raises:
        CheckpointError: The checkpoint cannot be read. The message names file, tensor and values.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise CheckpointError(f"{path or repr(path)}: {_why_missing(path)}")
        return _assemble(path, None, {os.path.basename(path): open_shard(path)}, {}, None)
    config = load_json(os.path.join(path, CONFIG), missing={})
    for single, index in ((SINGLE, INDEX), (SINGLE_BIN, INDEX_BIN)):
        if os.path.exists(os.path.join(path, single)):
            checkpoint = _assemble(path, path, {single: open_shard(os.path.join(path, single))}, config, None)
            if not os.path.exists(os.path.join(path, index)):
                return checkpoint
            note = f"{path}: {single} and {index} are in it; {single} counts, as for transformers"
            return replace(checkpoint, notes=(note,))
        if os.path.exists(os.path.join(path, index)):
            return _open_sharded(path, config, index, has_data)
    names = _names(path)
    if any(name.endswith((".distcp", ".pt")) for name in names):
        from .parts import open_parts  # a rare case, which other merges need not import

        parts = open_parts(path, names)
        if parts is not None:
            return _assemble_parts(path, parts)
    raise CheckpointError(_nothing_to_read(path, names))


def _assemble_parts(folder: str, parts: Parts) -> Checkpoint:
    """Return the checkpoint of a folder with parts, with the config and the files of the folder beside."""
    config, files = {}, {}
    if parts.config_folder is not None:
        config = load_json(os.path.join(parts.config_folder, CONFIG))
        files = find_other_files(parts.config_folder, set(parts.shards))
    weight_map = dict.fromkeys(parts.tensors, SINGLE)
    return Checkpoint(
        folder, folder, parts.shards, parts.tensors, weight_map, config, None, files,
        find_strays(parts.config_folder, files) if parts.config_folder else {}, views=parts.readers, in_parts=True,
    )  # fmt: skip


def _names(folder: str) -> list[str]:
    """Return the sorted names in a folder. Raises CheckpointError."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from error


def _open_sharded(folder: str, config: dict[str, Any], index_name: str, has_data: bool) -> Checkpoint:
    """Open a folder with an index; see `open_checkpoint`. Raises CheckpointError."""
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
    shards: dict[str, Shard] = {}
    for name in sorted(set(weight_map.values())):
        if not os.path.exists(os.path.join(folder, name)):
            raise CheckpointError(f"{where}: it names {name}, which is not in the folder; download it again")
        shards[name] = open_shard(os.path.join(folder, name))
    notes = compare_with_index(where, weight_map, shards, has_data)
    return replace(_assemble(folder, folder, shards, config, index), notes=notes)


def _assemble(
    path: str, folder: str | None, shards: dict[str, Shard], config: dict[str, Any], index: dict[str, Any] | None
) -> Checkpoint:
    """Return the checkpoint that consists of these shards.

    If two shards have the same tensor, the later shard counts. Raises CheckpointError if there is no tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    weight_map: dict[str, str] = {}
    for name, shard in shards.items():
        for tensor in shard.header.tensors:
            tensors[tensor.name] = tensor
            weight_map[tensor.name] = name
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it")
    files = find_other_files(folder, {*shards, INDEX}) if folder else {}
    strays = find_strays(folder, files) if folder else {}
    return Checkpoint(path, folder, shards, tensors, weight_map, config, index, files, strays)


def _why_missing(path: str) -> str:
    """Return why a path does not exist."""
    try:
        os.stat(path)
    except PermissionError as error:
        return error.strerror or str(error)
    except (OSError, ValueError):
        pass
    return "a broken link" if os.path.islink(path) else "no such file or folder"


def _nothing_to_read(folder: str, names: Sequence[str]) -> str:
    """Return the message about a folder without the weights of a whole model, and the way out."""
    for name in WHOLE_MODELS:
        if name in names:  # os.listdir lists a broken link, and os.path.exists has returned False for it
            return f"{os.path.join(folder, name)}: a broken link; download it again"
    if ADAPTER_CONFIG in names:
        return (
            f"{folder}: a PEFT adapter; only `aligned` may be one, over the checkpoint that `sft` names, or both over "
            "a `base`"
        )
    if any(name.startswith("adapter_model.") for name in names):
        return f"{folder}: a PEFT adapter without its {ADAPTER_CONFIG}; download it again"
    found = next((name for name in names if name.endswith(".gguf")), None)
    if found:
        return gguf_message(os.path.join(folder, found))
    from .training_folders import explain_training_folder  # a rare case, which other merges need not import

    training = explain_training_folder(folder, names)
    if training:
        return f"{folder}: {training}"
    other = next((name for name in names if name.endswith((*PICKLED, ".h5", ".msgpack", ".npz"))), None)
    hint = ""
    if other:
        hint = f"; load {other} with the library that wrote it, and save it with transformers' save_pretrained()"
    return f"{folder}: none of {SINGLE}, {INDEX}, {SINGLE_BIN} and {INDEX_BIN} is in it{hint}"
