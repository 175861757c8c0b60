"""A reader of a tensor whose elements do not lie in the file one after another, such as a transposed matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from .reader import FileReader
from .safetensors_header import element_count

SCRATCH = 1 << 20  # most bytes that are read at once
GAP = 1 << 13  # bytes between two elements: a shorter gap is read, a longer one is skipped


class StridedReader:
    """A reader of one tensor whose elements are spread over a file; it numbers the bytes as if they were contiguous."""

    scattered = True

    def __init__(self, reader: FileReader, start: int, dims: tuple[tuple[int, int], ...], item: int) -> None:
        """Describe the tensor.

        Args:
            reader: The reader of the file.
            start: The byte of the file that the first element starts at.
            dims: The length and the stride of each dimension; strides are in elements.
            item: Bytes of an element.
        """
        self._reader, self._start, self._item = reader, start, item
        self._shape = tuple(length for length, _ in dims)
        self._strides = tuple(stride for _, stride in dims)

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the tensor's bytes from `start` on. Raises CheckpointError."""
        import numpy as np

        memory, item = memoryview(into).cast("B"), self._item
        stop = start + len(memory)
        first, last = -(-start // item), stop // item  # elements [first, last) are read as a whole
        if start % item:
            part = self._element(start // item)[start % item : start % item + len(memory)]
            memory[: len(part)] = part
        if stop % item and last >= first:
            memory[len(memory) - stop % item :] = self._element(last)[: stop % item]
        at = first * item - start
        for base, depth, length in self._boxes(0, first, last, 0):
            shape = (length, *self._shape[depth + 1 :])[: len(self._shape) - depth]
            nbytes = element_count(shape) * item
            out = np.frombuffer(memory[at : at + nbytes], f"u{item}").reshape(shape)
            order = sorted(range(len(shape)), key=lambda dim, depth=depth: -self._strides[depth + dim])  # type: ignore[misc]
            self._fill(out.transpose(order), base, [self._strides[depth + dim] for dim in order])
            at += nbytes

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Give None: no bytes in a row are mapped, so the caller has to read."""
        yield None

    def read_ahead(self, start: int, stop: int) -> None:
        """Do nothing: the elements are spread over the file."""

    def _element(self, number: int) -> bytearray:
        """Return the bytes of one element, by its number in C order."""
        base = 0
        for length, stride in zip(reversed(self._shape), reversed(self._strides), strict=True):
            number, index = divmod(number, length)
            base += index * stride
        found = bytearray(self._item)
        self._reader.read(self._start + base * self._item, found)
        return found

    def _boxes(self, dim: int, first: int, stop: int, base: int) -> Iterator[tuple[int, int, int]]:
        """Cut elements [first, stop) into boxes, in C order over the dimensions from `dim` on.

        Args:
            dim: The first dimension that counts; the ones before it are fixed.
            first: The first element.
            stop: The element after the last one.
            base: Elements of the file between the tensor's start and element 0.

        Yields:
            A box (distance, dim, length): the distance of its first element from the tensor's start, in elements of the
            file, and a dimension. The box has `length` indices along this dimension, and all indices along later ones.
        """
        if first >= stop:
            return
        if dim == len(self._shape):
            yield base, dim, 1
            return
        row, stride = element_count(self._shape[dim + 1 :]), self._strides[dim]
        begin, end = -(-first // row), stop // row  # whole rows
        if first < begin * row:
            within = (begin - 1) * row
            yield from self._boxes(dim + 1, first - within, min(stop - within, row), base + (begin - 1) * stride)
        if begin < end:
            yield base + begin * stride, dim, end - begin
        if end * row < stop and begin <= end:
            yield from self._boxes(dim + 1, 0, stop - end * row, base + end * stride)

    def _fill(self, out: Any, base: int, strides: Sequence[int]) -> None:
        """Set out[i, j, ...] to the element at base + i * strides[0] + j * strides[1] + ..., in few reads.

        The largest stride is first.
        """
        import numpy as np

        if not out.ndim:
            out, strides = out.reshape(1), (0,)
        most_elements, widest_gap = SCRATCH // self._item, GAP // self._item
        # spans[d] counts the elements of the file from the first to the last one over the dimensions from d on.
        spans = [1]
        for length, stride in zip(reversed(out.shape), reversed(strides), strict=True):
            spans.insert(0, spans[0] + (length - 1) * stride)
        inner, step = spans[1], strides[0]
        gaps = (stride - span for stride, span in zip(strides[1:], spans[2:], strict=True))
        if out.ndim > 1 and (inner > most_elements or any(gap > widest_gap for gap in gaps)):
            for i in range(len(out)):
                self._fill(out[i, ...], base + i * step, strides[1:])
            return
        apart = step - inner > widest_gap  # the rows lie too far from one another to be read together
        if not step:
            rows = len(out)
        else:
            rows = max(1, most_elements // inner if apart else 1 + (most_elements - inner) // step)
        for i in range(0, len(out), rows):
            part = out[i : i + rows]
            found = np.empty(len(part) * inner if apart else inner + (len(part) - 1) * step, out.dtype)
            for k in range(len(part) if apart else 1):
                piece = found[k * inner : (k + 1) * inner] if apart else found
                self._reader.read(self._start + (base + (i + k) * step) * self._item, piece)
            layout = [stride * self._item for stride in (inner if apart else step, *strides[1:])]
            part[...] = np.ndarray(part.shape, found.dtype, found, strides=layout)
