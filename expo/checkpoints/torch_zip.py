"""PyTorch's zip form of a weight file, written since torch 1.6: PREFIX/data.pkl, and each storage in PREFIX/data/KEY.

An entry with a storage has its bytes as they are in memory, so that they can be mapped. Source:
github.com/pytorch/pytorch, torch/serialization.py (_save and _load).
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CheckpointError
from .torch_tensors import View, read_views, tensor_error
from .unpickler import FIX, MAX_PICKLE, TORCH_ITEMSIZE, PickleStream, Unpickler

if TYPE_CHECKING:
    from hashlib import _Hash

ReadTop = Callable[[str, Any], list[View]]  # (path, the value that a pickle builds) -> its tensors
MAX_DIRECTORY = 1 << 24  # most bytes of a zip file's directory; an entry takes about 100


def read_zip(
    path: str, file: BinaryIO, size: int, digest: _Hash, read: ReadTop | None = None, start: int = 0
) -> tuple[list[View], dict[str, int]]:
    """Read the pickle in a zip file.

    Args:
        path: The file, for messages.
        file: The open file.
        size: The size of the zip file in bytes.
        digest: A hash that the bytes of the pickle update.
        read: Returns the tensors in the value that the pickle builds, which may have objects of any class then; None
            for a dict of tensors.
        start: The byte of the file that the zip file starts at.

    Returns:
        The tensors, and the byte of the file that each storage starts at, by the storage's key.

    Raises:
        CheckpointError: The file is damaged, or has more than plain tensors.
    """
    entries = _read_directory(path, file, start, size)
    size += start
    prefix = _find_prefix(path, entries)
    pickle = entries[f"{prefix}data.pkl"]
    used = {pickle.filename: (pickle.header_offset, _content_start(path, file, size, pickle) + pickle.file_size)}
    if f"{prefix}byteorder" in entries:
        start = _content_start(path, file, size, entries[f"{prefix}byteorder"])
        order = os.pread(file.fileno(), min(16, entries[f"{prefix}byteorder"].file_size), start)
        if order != b"little":
            raise CheckpointError(f"{path}: its bytes are in the order {order!r}, but only 'little' is read")
    if pickle.file_size > MAX_PICKLE:
        raise CheckpointError(
            f"{path}: a pickle of {pickle.file_size} bytes, but at most {MAX_PICKLE} are read; not plain weights?"
        )
    stream = PickleStream(file, used[pickle.filename][1] - pickle.file_size, pickle.file_size, digest)
    top = Unpickler(path, stream, {}, objects=read is not None).run()
    views = (read or read_views)(path, top)
    places: dict[str, int] = {}
    for view in views:
        if view.storage.key not in places:
            entry = _find_entry(path, view, entries, prefix)
            places[view.storage.key] = start = _content_start(path, file, size, entry)
            used[entry.filename] = (entry.header_offset, start + entry.file_size)
    _check_apart(path, used)
    return views, places


class _LimitedFile:
    """Bytes [start, start + size) of a file for zipfile. A large directory is refused: zipfile would read any."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"byte {base + offset} is before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            raise ValueError(f"a directory of {count} bytes, but at most {MAX_DIRECTORY} are read")
        # Without a count, zipfile reads the last bytes of the file, at most 65557 of them.
        count = min(count if count >= 0 else 1 << 17, max(self._size - self._at, 0))
        self._file.seek(self._start + self._at)
        found = self._file.read(count)
        self._at += len(found)
        return found


def _read_directory(path: str, file: BinaryIO, start: int, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name, with their places in the file.

    A damaged directory may raise errors of several kinds in zipfile.
    """
    limited: Any = _LimitedFile(file, start, size)
    try:
        with zipfile.ZipFile(limited) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: it starts like a zip file of torch.save, but the directory at its end cannot be read ({error}): "
            "truncated? download it again"
        ) from error
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        if entry.filename in entries:
            raise CheckpointError(f"{path}: {entry.filename!r} occurs twice in the zip file")
        entry.header_offset += start
        entries[entry.filename] = entry
    return entries


def _find_prefix(path: str, entries: dict[str, zipfile.ZipInfo]) -> str:
    """Return the folder of the entries, with its slash. Raises CheckpointError."""
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise CheckpointError(f"{path}: a zip file with {len(found)} entries */data.pkl, but torch.save writes one")
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise CheckpointError(f"{path}: a TorchScript program, which is not plain weights; {FIX}")
    return prefix


def _find_entry(path: str, view: View, entries: dict[str, zipfile.ZipInfo], prefix: str) -> zipfile.ZipInfo:
    """Return the entry with the tensor's storage, after its size is compared with the pickle's."""
    storage = view.storage
    entry = entries.get(f"{prefix}data/{storage.key}")
    if entry is None:
        what = f"it is in storage {storage.key!r}, which is not in the file; download it again"
        raise tensor_error(path, view.name, what)
    nbytes = storage.total * TORCH_ITEMSIZE[storage.dtype]
    if entry.file_size != nbytes:
        what = (
            f"storage {storage.key!r} has {storage.total} elements of torch.{storage.dtype}, {nbytes} bytes, but "
            f"{entry.file_size} bytes in the file"
        )
        raise tensor_error(path, view.name, what)
    return entry


def _content_start(path: str, file: BinaryIO, size: int, entry: zipfile.ZipInfo) -> int:
    """Return the byte of the file that an entry's content starts at.

    The header before the content decides, and not the directory: they may give different lengths.
    """
    where = f"{path}: zip entry {entry.filename!r}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{where} is compressed or encrypted, and torch.save never does so; unzip and zip -0 it")
    at = entry.header_offset
    local = os.pread(file.fileno(), 30, at) if 0 <= at < size else b""
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{where} is said to start at byte {at} of {size}, but does not; download it again")
    before, extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:], "little")
    name = os.pread(file.fileno(), before, at + 30)
    if name.decode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace") != entry.orig_filename:
        raise CheckpointError(f"{where} has the name {name!r} at byte {at}; download it again")
    start = at + 30 + before + extra
    if start + entry.file_size > size:
        raise CheckpointError(
            f"{where} ends at byte {start + entry.file_size}, but the file has {size}: truncated; download it again"
        )
    return start


def _check_apart(path: str, used: dict[str, tuple[int, int]]) -> None:
    """Raise CheckpointError if two zip entries have bytes in common. The values of `used` are (start, stop)."""
    end, before = 0, ""
    for name, (start, stop) in sorted(used.items(), key=lambda item: item[1]):
        if start < end:
            raise CheckpointError(f"{path}: zip entry {name!r} starts at byte {start}, but {before!r} ends at {end}")
        end, before = stop, name
