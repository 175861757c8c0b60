"""A shard: one weight file of a checkpoint, as its header describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .reader import ByteReader, FileReader
    from .safetensors_header import Header


class Shard(NamedTuple):
    """One weight file: its tensors, and the readers of their bytes.

    Attributes:
        path: Path of the file.
        size: Size of the file in bytes.
        header: The file's tensors and its own metadata.
        digest: SHA-256 in hexadecimal of all bytes that say where the tensors are.
        reader: The reader of the file.
        readers: A reader by name for each tensor whose elements do not lie in the file one after another. The bytes
            [start, stop) of such a tensor's TensorInfo are bytes of this reader.
    """

    path: str
    size: int
    header: Header
    digest: str
    reader: FileReader
    readers: Mapping[str, ByteReader]

    def reader_of(self, tensor: str) -> ByteReader:
        """Return the reader of the bytes [start, stop) of the tensor's TensorInfo, by the tensor's name in the file."""
        return self.readers.get(tensor, self.reader)
