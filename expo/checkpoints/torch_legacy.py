"""PyTorch's form of a weight file before torch 1.6: pickles one after another, and then the storages.

The pickles are a magic number, the version, the machine's type sizes, the dict, and the list of the storages' keys. For
each key follow an int64 number of elements, and the elements. Source: github.com/pytorch/pytorch,
torch/serialization.py (_legacy_save and _legacy_load).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CheckpointError
from .torch_tensors import View, read_views, tensor_error
from .unpickler import MAX_PICKLE, TORCH_ITEMSIZE, PickleStream, Storage, Unpickler

if TYPE_CHECKING:
    from hashlib import _Hash

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_legacy(path: str, file: BinaryIO, size: int, digest: _Hash) -> tuple[list[View], dict[str, int]]:
    """Read the pickles of a file of the older form; the arguments and the result are those of torch_zip.read_zip."""
    stream = PickleStream(file, 0, min(size, MAX_PICKLE), digest)
    magic, version, system = (Unpickler(path, stream, {}).run() for _ in range(3))
    if type(magic) is not int or magic != MAGIC or type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path}: its first pickles are not {MAGIC:#x} and {VERSION}; download it again")
    _check_system(path, system)
    storages: dict[str, Storage] = {}
    views = read_views(path, Unpickler(path, stream, storages).run())
    keys = Unpickler(path, stream, {}).run()
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise CheckpointError(f"{path}: its list of storages is not one of those that its tensors are in")
    places, end = _find_storages(path, file, size, stream.position, [storages[key] for key in keys])
    for view in views:
        if view.storage.key not in places:
            raise tensor_error(path, view.name, f"it is in storage {view.storage.key!r}, which is not in the file")
    if end != size:
        raise CheckpointError(
            f"{path}: its last storage ends at byte {end}, but the file has {size}; download it again"
        )
    return views, places


def _check_system(path: str, system: Any) -> None:
    """Raise CheckpointError for a file from a machine whose numbers have another form."""
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: it was written on a machine with big-endian numbers, which are not read")
    sizes = system.get("type_sizes")
    if type(sizes) is not dict or [sizes.get(name) for name in ("short", "int", "long")] != [2, 4, 4]:
        raise CheckpointError(f"{path}: its short, int and long do not have 2, 4 and 4 bytes")


def _find_storages(
    path: str, file: BinaryIO, size: int, at: int, storages: Sequence[Storage]
) -> tuple[dict[str, int], int]:
    """Return where the storages lie, which follow one another from byte `at` of the file on.

    Returns:
        The byte that each storage's elements start at, by the storage's key, and the byte that the last one ends at.

    Raises:
        CheckpointError: The file ends too early, or a storage has another number of elements than the pickle says.
    """
    places: dict[str, int] = {}
    for storage in storages:
        if storage.key in places:
            raise CheckpointError(f"{path}: storage {storage.key!r} occurs twice in it")
        count = int.from_bytes(os.pread(file.fileno(), 8, at), "little", signed=True)
        places[storage.key] = at + 8
        at += 8 + storage.total * TORCH_ITEMSIZE[storage.dtype]
        if at > size:
            raise CheckpointError(
                f"{path}: storage {storage.key!r} ends at byte {at}, but the file has {size}: truncated; "
                "download it again"
            )
        if count != storage.total:
            raise CheckpointError(
                f"{path}: storage {storage.key!r} has {storage.total} elements in the pickle, but {count} at byte "
                f"{places[storage.key] - 8}; download it again"
            )
    return places, at
