"""The data of an adapter: its factors as arrays, and comparisons of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..dtypes import numpy_dtypes
from ..errors import CheckpointError
from .adapter import Adapter, FactorPart, LowRank
from .lora_config import BASE
from .reader import ByteReader
from .safetensors_header import TensorInfo
from .shard import Shard

COMPARED_BYTES = 1 << 20  # most bytes of a tensor that are compared at a time
WIDEST = 8  # bytes of an element of the widest dtype


def read_factors(shard: Shard, delta: LowRank) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the left factor [M, r] and the right factor [r, N] of a delta, in the dtypes of the file.

    A factor that is stored the other way round is a transposed view.
    """
    if delta.blocks:
        return _read_blocks(shard, delta)
    if delta.part is not None:
        return _read_part(shard, delta, delta.part)
    left, right = (_read_matrix(shard, tensor) for tensor in (delta.left, delta.right))
    return left.T if delta.left_transposed else left, right.T if delta.right_transposed else right


def _read_blocks(shard: Shard, delta: LowRank) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the factors of all runs of rows as one pair, whose left factor is 0 outside of the blocks."""
    pairs = [read_factors(shard, block) for _, block in delta.blocks]
    left = np.zeros((delta.rows, delta.rank), pairs[0][0].dtype)
    column = 0
    for (row, _), (block, _) in zip(delta.blocks, pairs, strict=True):
        left[row : row + block.shape[0], column : column + block.shape[1]] = block
        column += block.shape[1]
    return left, np.concatenate([right for _, right in pairs])


def _read_part(shard: Shard, delta: LowRank, part: FactorPart) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return one expert's rows of both factors; the columns of an expert are a strided view of the left one."""
    left = _read_matrix(shard, delta.left, part.start, part.stop)[:, part.expert :: part.experts]
    return left, _read_matrix(shard, delta.right, part.expert * delta.rank, (part.expert + 1) * delta.rank)


def _read_matrix(shard: Shard, tensor: TensorInfo, first: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
    """Return rows [first, stop) of a matrix, or all of them."""
    rows = (tensor.shape[0] if stop is None else stop) - first
    row = tensor.nbytes // tensor.shape[0]
    data = bytearray(rows * row)
    shard.reader_of(tensor.name).read(tensor.start + first * row, data)
    return np.frombuffer(data, numpy_dtypes()[tensor.dtype]).reshape(rows, *tensor.shape[1:])


def are_equal(shard: Shard, one: TensorInfo | LowRank, other: TensorInfo | LowRank) -> bool:
    """Return True if two whole tensors of the file have the same bytes, or two deltas the same scale and factors."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        sides = zip(read_factors(shard, one), read_factors(shard, other), strict=True)
        return one.scale == other.scale and all(np.array_equal(a, b) for a, b in sides)
    assert isinstance(one, TensorInfo)
    assert isinstance(other, TensorInfo)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    sides_in_parts = (_read_parts(shard.reader_of(tensor.name), tensor, COMPARED_BYTES) for tensor in (one, other))
    return all(a == b for a, b in zip(*sides_in_parts, strict=True))


def check_copies(adapter: Adapter, base: Mapping[str, TensorInfo], reader: Callable[[str], ByteReader]) -> None:
    """Compare the tensors that the adapter repeats of its base with the base's own, rounded to the adapter's dtype.

    PEFT saves the embedding beside an embedding's LoRA, and training leaves that embedding as it is.

    Args:
        adapter: The adapter.
        base: The tensors of the base by name.
        reader: Returns the reader of a base tensor, by its name.

    Raises:
        CheckpointError: A tensor differs, so the adapter was trained from another base.
    """
    for name, copy in adapter.copies.items():
        copy_parts = _read_elements(adapter.shard.reader_of(copy.name), copy)
        base_parts = _read_elements(reader(name), base[name])
        for in_copy, in_base in zip(copy_parts, base_parts, strict=True):
            with np.errstate(over="ignore"):
                rounded = in_base.astype(in_copy.dtype)
            if in_copy.tobytes() != rounded.tobytes():
                raise CheckpointError(
                    f"{adapter.shard.path}: {copy.name!r}, a copy of the base's tensor, differs from sft's {name!r}; "
                    f"{BASE}"
                )


def _read_parts(reader: ByteReader, tensor: TensorInfo, size: int) -> Iterator[bytearray]:
    """Yield a tensor's bytes, `size` at a time."""
    for start in range(tensor.start, tensor.stop, size):
        part = bytearray(min(size, tensor.stop - start))
        reader.read(start, part)
        yield part


def _read_elements(reader: ByteReader, tensor: TensorInfo) -> Iterator[np.ndarray[Any, Any]]:
    """Yield a tensor's elements in flat arrays, whose lengths are the same for tensors of any dtype."""
    dtype = numpy_dtypes()[tensor.dtype]
    for part in _read_parts(reader, tensor, COMPARED_BYTES // WIDEST * dtype.itemsize):
        yield np.frombuffer(part, dtype)
