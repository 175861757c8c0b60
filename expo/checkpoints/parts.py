"""Make one checkpoint of a folder with the parts that the processes of a training have saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..dtypes import BITS
from ..errors import CheckpointError
from .files import CONFIG
from .piecewise_reader import PiecewiseReader, why_not_covered
from .reader import ByteReader
from .safetensors_header import TensorInfo, element_count
from .shard import Shard

# The folders, from the one with the parts, that may have the config and the tokenizer: verl's `huggingface`, and the
# folder of the whole checkpoint, in which accelerate and others make one for the parts.
BESIDE = (".", "huggingface", "..", os.path.join("..", "huggingface"))


class Parts(NamedTuple):
    """The tensors of a folder with parts.

    Attributes:
        shards: The files by name.
        tensors: The tensors by name; their bytes begin at 0.
        readers: The reader of each tensor, by name.
        config_folder: The folder beside with config.json; None if there is none.
    """

    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    readers: dict[str, ByteReader]
    config_folder: str | None


def open_parts(folder: str, names: Sequence[str]) -> Parts | None:
    """Return the tensors of a folder with the parts of FSDP, or with a distributed checkpoint; None for any other.

    Args:
        folder: The path of the folder.
        names: The names in it.

    Raises:
        CheckpointError: A part is missing or damaged, or the parts do not make whole tensors.
    """
    from .distributed_checkpoint import METADATA, read_distributed
    from .rank_files import RANK_FILE, read_rank_files

    if any(map(RANK_FILE.fullmatch, names)):
        shards, stored = read_rank_files(folder, names)
    elif METADATA in names and any(name.endswith(".distcp") for name in names):
        shards, stored = read_distributed(folder)
    else:
        return None
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, ByteReader] = {}
    for name, tensor in stored.items():
        why = why_not_covered(tensor.shape, [piece[:2] for piece in tensor.pieces])
        if why:
            shape = list(tensor.shape)
            raise CheckpointError(f"{folder}: tensor {name!r} has the shape {shape}, and {why}; copy all parts again")
        nbytes = element_count(tensor.shape) * BITS[tensor.dtype] // 8
        tensors[name] = TensorInfo(name, tensor.dtype, tensor.shape, 0, nbytes)
        readers[name] = PiecewiseReader(tensor.shape, tensor.pieces, BITS[tensor.dtype] // 8)
    beside = (os.path.normpath(os.path.join(folder, place)) for place in BESIDE)
    found = next((place for place in beside if os.path.exists(os.path.join(place, CONFIG))), None)
    return Parts(shards, tensors, readers, found)
