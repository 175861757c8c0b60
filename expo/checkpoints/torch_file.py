"""Weight files of PyTorch's own format, such as pytorch_model.bin, read without torch and without running anything.

Such a file has a pickle, whose instructions build a dict of tensors, and storages: runs of bytes that the tensors are
views of. The pickle and the storages are laid out in a zip file, or in the older form one after another; both forms can
be mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from ..dtypes import FROM_TORCH
from ..errors import CheckpointError
from .reader import FileReader, Identity, open_regular_file
from .safetensors_header import Header, TensorInfo
from .shard import Shard
from .strided_reader import StridedReader
from .torch_legacy import MAGIC, read_legacy
from .torch_tensors import View, locate
from .torch_zip import read_zip
from .unpickler import TORCH_ITEMSIZE

if TYPE_CHECKING:
    from hashlib import _Hash

    Form = Callable[[str, BinaryIO, int, _Hash], tuple[list[View], dict[str, int]]]


def open_torch_file(path: str) -> Shard:
    """Read and check the pickle of a file that torch.save wrote. The storages are not read.

    Returns:
        The shard. A tensor whose elements do not lie in the file one after another has a reader of its own, and its
        TensorInfo has start 0.

    Raises:
        CheckpointError: The file is damaged, or holds more than plain tensors.
    """
    digest = hashlib.sha256()
    try:
        with open_regular_file(path) as file:
            identity = Identity.of(file.fileno())
            read = _find_form(path, file.read(512), identity.size)
            views, places = read(path, file, identity.size, digest)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return place_tensors(path, identity, views, places, digest)


def place_tensors(
    path: str,
    identity: Identity,
    views: Sequence[View],
    places: Mapping[str, int],
    digest: _Hash,
    reader: FileReader | None = None,
) -> Shard:
    """Return the shard with these tensors, sorted by their places in the file.

    Args:
        path: The file.
        identity: The identity that it had when it was read.
        views: The tensors.
        places: The byte of the file that each storage starts at, by the storage's key.
        digest: A hash of the pickle, to which this function adds the storages' places.
        reader: The reader of the file; None to make one.

    Raises:
        CheckpointError: A tensor ends outside its storage, or has more dimensions than NumPy can gather.
    """
    reader = reader or FileReader(path, identity)
    tensors, readers = [], {}
    for view in views:
        first, nbytes, dims = locate(path, view)
        start = places[view.storage.key] + first
        if dims and dims != ((dims[0][0], 1),):
            readers[view.name] = StridedReader(reader, start, dims, TORCH_ITEMSIZE[view.dtype])
            start = 0
        tensors.append(TensorInfo(view.name, FROM_TORCH[view.dtype], view.shape, start, start + nbytes))
    header = Header(tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.name))), {})
    digest.update(repr(sorted(places.items())).encode("utf-8"))
    return Shard(path, identity.size, header, digest.hexdigest(), reader, readers)


def _find_form(path: str, first: bytes, size: int) -> Form:
    """Return the function that reads a file with these first bytes. Raises CheckpointError for unknown bytes."""
    if first.startswith(b"PK\x03\x04"):
        return read_zip
    if first.startswith(b"\x80") and MAGIC.to_bytes(10, "little") in first[:32]:
        return read_legacy
    if not first:
        what = "an empty file; download it again"
    elif first.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    elif first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, not the file itself; download it again, from the address that the page links to"
    elif first[257:262] == b"ustar":
        what = "in the tar format of the first versions of torch; load it with torch, and torch.save() it"
    elif first[8:9] == b"{" and 8 + int.from_bytes(first[:8], "little") <= size:
        what = "a safetensors file by another name; rename it to .safetensors"
    else:
        what = f"{size} bytes that start with {first[:8]!r}, which is nothing that torch.save writes; download it again"
    raise CheckpointError(f"{path}: {what}")
