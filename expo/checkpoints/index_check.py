"""Compare an index with the shards that it names.

transformers 5 opens every shard that the index names, in the order of the file names, and takes all tensors of each: a
later shard's tensor replaces an earlier one's. It follows the index itself only for weights that it offloads to a disk.
A difference does no harm where both ways give the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .shard import Shard

COMPARED = 1 << 22  # bytes of two copies that are compared at a time


def compare_with_index(
    where: str, weight_map: Mapping[str, str], shards: Mapping[str, Shard], has_data: bool
) -> tuple[str, ...]:
    """Return notes about the tensors that an index and its shards do not agree on.

    Args:
        where: The path of the index.
        weight_map: The file name of each tensor's shard, as the index says.
        shards: The shards by file name, in the order of the names.
        has_data: False if the shards have headers alone; copies of a tensor are then not compared.

    Raises:
        CheckpointError: Two shards have different tensors of one name, and the index names the earlier shard.
    """
    found: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for tensor in shard.header.tensors:
            found.setdefault(tensor.name, []).append(file)
    absent = [(name, "") for name in weight_map if name not in found]
    unnamed = [(name, "") for name, files in found.items() if name not in weight_map and len(files) == 1]
    elsewhere, superseded, equal = [], [], []
    for name, files in found.items():
        named = weight_map.get(name, files[-1])
        if len(files) > 1 and named == files[-1]:
            superseded.append((name, files[-1]))
        elif named in files[:-1]:
            if has_data and not _same_bytes(shards[named], shards[files[-1]], name):
                raise CheckpointError(_conflict(where, name, named, files[-1]))
            equal.append((name, files[-1]))
        elif named not in files:
            elsewhere.append((name, files[-1]))
    kinds = (
        (absent, "is in the index and in no shard, so the model lacks it"),
        (unnamed, "is in a shard and not in the index; it counts, as transformers reads whole shards"),
        (
            elsewhere,
            "is in another shard than the index says; the one in {} counts, as transformers reads whole shards",
        ),
        (superseded, "is in several shards; the one in {} counts, as for transformers, which takes the last file's"),
        (equal, "is in several shards with the same bytes; the one in {} is read" if has_data else _NOT_COMPARED),
    )
    return tuple(
        f"{where}: {names[0][0]!r} {text.format(names[0][1])}"
        + f" ({len(names)} tensors are like that)" * (len(names) > 1)
        for names, text in kinds
        if names
    )


_NOT_COMPARED = "is in several shards; a merge refuses them if the bytes differ, which their headers do not show"


def _conflict(where: str, name: str, named: str, last: str) -> str:
    """Return the message about a tensor whose copies differ, and of which the index names the earlier one."""
    return (
        f"{where}: tensor {name!r} is said to be in {named}, but {last} has other bytes under this name; transformers "
        f"takes those in {last}, unless it offloads the tensor to a disk; if they are the right ones, name {last} in "
        f"the index, else remove the tensor from {last}"
    )


def _same_bytes(one: Shard, other: Shard, name: str) -> bool:
    """Return True if two shards have the same tensor under a name. Raises CheckpointError if a file has changed."""
    tensors = [next(each for each in shard.header.tensors if each.name == name) for shard in (one, other)]
    if (tensors[0].dtype, tensors[0].shape) != (tensors[1].dtype, tensors[1].shape):
        return False
    readers = [shard.reader_of(name) for shard in (one, other)]
    for at in range(0, tensors[0].nbytes, COMPARED):
        memories = [bytearray(min(COMPARED, tensors[0].nbytes - at)) for _ in readers]
        for reader, tensor, memory in zip(readers, tensors, memories, strict=True):
            reader.read(tensor.start + at, memory)
        if memories[0] != memories[1]:
            return False
    return True
