"""The header of a safetensors file: a strict parser, and a writer.

A file has 8 bytes with the length of the header in little-endian order, then the header, which is a JSON object, then
the data. Each tensor's entry gives its dtype, its shape, and data_offsets [begin, end) relative to the data. Sorted by
offset the tensors cover the data exactly, from its first byte to its last. Source:
github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..dtypes import BITS
from ..errors import CheckpointError

MAX_HEADER = 100_000_000  # most bytes of a header, as in the reference implementation
ALIGNMENT = 4096  # the data of an output start at a multiple of this, so that whole blocks are written

_WIDTH_ORDER = {dtype: number for number, dtype in enumerate(BITS)}


class TensorInfo(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: The tensor's name.
        dtype: The safetensors name of its dtype.
        shape: The number of elements along each dimension; () for a scalar.
        start: The byte of the file, counted from the file's first byte, that the tensor starts at.
        stop: The byte after the tensor's last one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in bytes."""
        return self.stop - self.start


class Header(NamedTuple):
    """A parsed header: the tensors in the order of their data, and the file's own metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def header_length(path: str, first: bytes, size: int) -> int:
    """Return the length of the header's JSON in bytes.

    Args:
        path: The file, for messages.
        first: The first bytes of the file, at least 8 if it has so many.
        size: The size of the file in bytes.

    Raises:
        CheckpointError: No header of this length fits into the file.
    """
    if len(first) < 8:
        raise CheckpointError(f"{path}: {size} bytes, but a safetensors file has at least 8; download it again")
    length = int.from_bytes(first[:8], "little")
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: header of {length} bytes, but at most {MAX_HEADER} are allowed; not a safetensors file?"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: header ends at byte {8 + length}, but the file has {size}: truncated; download it again"
        )
    return length


def parse(path: str, text: bytes, size: int) -> Header:
    """Check every rule of the format and return the tensors.

    Args:
        path: The file, for messages.
        text: The header's JSON.
        size: The size of the whole file in bytes.

    Raises:
        CheckpointError: A rule is broken. The message names the file, the tensor and the two values that disagree.
    """
    entries = _load(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    if not is_unicode(*metadata, *metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not valid Unicode")
    start = 8 + len(text)
    tensors = [_tensor(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end, before = start, "the header"
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.start}, but {before} ends at {end}"
            )
        end, before = tensor.stop, f"tensor {tensor.name!r}"
    if end != size:
        kind = "truncated; download it again" if size < end else "bytes that belong to no tensor"
        raise CheckpointError(f"{path}: {before} ends at byte {end}, but the file has {size}: {kind}")
    return Header(tuple(tensors), metadata)


def _load(path: str, text: bytes) -> dict[str, Any]:
    """Return the JSON object of a header. Raises CheckpointError, also for a key that occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: {twice!r} occurs twice in the header")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); not a safetensors file?") from error
    if not text.startswith(b"{") or not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object that starts with '{{'")
    return entries


def _tensor(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Return the tensor of an entry after its dtype, shape and offsets are checked. Raises CheckpointError."""

    def error_about(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}")

    if not is_unicode(name):
        raise error_about("its name is not valid Unicode")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error_about("its entry is not an object of dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise error_about(f"dtype {dtype!r} is none of {', '.join(BITS)}")
    if not _naturals(shape):
        raise error_about(f"shape {shape!r} is not a list of whole numbers from 0 to 2^63 - 1")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error_about(f"data_offsets {offsets!r} are not [begin, end] with begin <= end")
    bits = BITS[dtype]
    for length in shape:
        bits *= length
        if bits >= 2**66:
            raise error_about(f"shape {shape} of {dtype} is over 2^63 bytes")
    begin, end = offsets
    if bits % 8 or bits // 8 != end - begin:
        raise error_about(f"shape {shape} of {dtype} takes {bits / 8:g} bytes, but its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _whole(digits: str) -> int:
    """Return the number that JSON's digits mean. Raises ValueError for -0."""
    if digits == "-0":  # a float to the reference implementation
        raise ValueError("-0 is no whole number")
    return int(digits)


def is_unicode(*texts: str) -> bool:
    """Return True if UTF-8 can encode the texts: JSON can have half of a surrogate pair, which UTF-8 cannot."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _naturals(value: Any) -> bool:
    """Return True for a list of whole numbers from 0 to 2^63 - 1."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def emit(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the first bytes of a new file and the place of each tensor in it.

    The order is safetensors' own: the widest dtype first, then by name. Spaces after the header make the data start at
    a multiple of 4096.

    Args:
        tensors: The name, the dtype and the shape of each tensor.
        metadata: The file's own metadata.

    Returns:
        The length and the header as bytes, and the tensors by name in the order of their data.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_WIDTH_ORDER[tensor[1]], tensor[0]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in ordered:
        begin, offset = offset, offset + element_count(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, offset]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    placed = {}
    for name, dtype, shape in ordered:
        begin, end = entries[name]["data_offsets"]
        placed[name] = TensorInfo(name, dtype, shape, start + begin, start + end)
    return len(text).to_bytes(8, "little") + text, placed


def describe(tensor: TensorInfo) -> str:
    """Return a tensor's dtype and shape: `BF16 [4096, 32]`."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def element_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of this shape; 1 for the shape () of a scalar."""
    count = 1
    for length in shape:
        count *= length
    return count
