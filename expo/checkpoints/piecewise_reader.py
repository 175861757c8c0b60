"""A reader of a tensor whose pieces lie in several files, as trainers save it from several processes."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from .reader import ByteReader


class Piece(NamedTuple):
    """A box of a tensor, stored in C order.

    Attributes:
        offsets: The first index of the box along each dimension.
        sizes: The number of indices along each dimension.
        reader: The reader of the box's bytes.
        start: The byte that the box starts at, as the reader counts.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    reader: ByteReader
    start: int


class StoredTensor(NamedTuple):
    """A tensor in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]


class _Runs:
    """A piece as runs of elements that follow each other in the whole tensor too."""

    def __init__(self, piece: Piece, shape: tuple[int, ...]) -> None:
        self.piece = piece
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        # The dimensions after `last` are whole in the piece, so the elements of a run follow each other.
        last = max((dim for dim in range(len(shape)) if piece.sizes[dim] != shape[dim]), default=-1)
        self.length = prod(piece.sizes[max(last, 0) :])
        self._counts = piece.sizes[: max(last, 0)]
        self.count = prod(self._counts) if self.length else 0
        self._strides = strides[: max(last, 0)]
        self._first = sum(offset * stride for offset, stride in zip(piece.offsets, strides, strict=True))

    def begin(self, number: int) -> int:
        """Return the element of the whole tensor that run `number` starts at."""
        at = self._first
        for count, stride in zip(reversed(self._counts), reversed(self._strides), strict=True):
            number, index = divmod(number, count)
            at += index * stride
        return at

    def between(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (element of the tensor, element of the piece, elements) for the parts of runs in [first, stop)."""
        number = bisect.bisect_right(range(self.count), first - self.length, key=self.begin)
        for each in range(number, self.count):
            begin = self.begin(each)
            low, high = max(first, begin), min(stop, begin + self.length)
            if begin >= stop:
                return
            yield low, each * self.length + low - begin, high - low


class PiecewiseReader:
    """The reader of one tensor in pieces; it numbers the bytes as if they were contiguous."""

    scattered = False

    def __init__(self, shape: tuple[int, ...], pieces: Sequence[Piece], item: int) -> None:
        """Describe the tensor.

        Args:
            shape: The shape of the whole tensor.
            pieces: Boxes that cover the tensor, without a gap or an overlap.
            item: The bytes of an element.
        """
        self._item = item
        self._runs = [_Runs(piece, shape) for piece in pieces]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, Piece, int, int]]:
        """Yield (byte of the tensor, piece, byte of its reader, bytes) for the stored parts of bytes [start, stop)."""
        item = self._item
        for runs in self._runs:
            for at, inside, count in runs.between(start // item, -(-stop // item)):
                low, high = max(start, at * item), min(stop, (at + count) * item)
                yield low, runs.piece, runs.piece.start + inside * item + low - at * item, high - low

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the tensor's bytes from `start` on. Raises CheckpointError."""
        memory = memoryview(into).cast("B")
        for at, piece, begin, nbytes in self._parts(start, start + len(memory)):
            piece.reader.read(begin, memory[at - start : at - start + nbytes])

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Give bytes [start, stop) in mapped memory if one piece has them in a row; else None."""
        parts = self._parts(start, stop)
        first = next(parts, None)
        if first is None or first[3] < stop - start:
            yield None
            return
        _, piece, begin, nbytes = first
        with piece.reader.mapped(begin, begin + nbytes) as view:
            yield view

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading bytes [start, stop) from the disk."""
        ends: dict[int, tuple[Piece, int, int]] = {}
        for _, piece, begin, nbytes in self._parts(start, stop):
            low = ends[id(piece)][1] if id(piece) in ends else begin
            ends[id(piece)] = piece, low, begin + nbytes
        for piece, low, high in ends.values():
            piece.reader.read_ahead(low, high)


def why_not_covered(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Return why boxes, each with its offsets and its sizes, do not cover a tensor exactly; None if they do."""
    full = [box for box in boxes if 0 not in box[1]]
    for offsets, sizes in full:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a piece has {len(offsets)} dimensions"
        if any(offset + size > length for offset, size, length in zip(offsets, sizes, shape, strict=True)):
            return f"a piece of shape {list(sizes)} at {list(offsets)} ends outside"
    stored = sum(prod(sizes) for _, sizes in full)
    if stored != prod(shape):
        return f"its pieces have {stored} elements"
    for number, (offsets, sizes) in enumerate(full):
        for others, other_sizes in full[:number]:
            if all(a < b + m and b < a + n for a, n, b, m in zip(offsets, sizes, others, other_sizes, strict=True)):
                return f"two pieces, at {list(others)} and at {list(offsets)}, overlap"
    return None
