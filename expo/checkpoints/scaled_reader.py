"""Readers of quantised tensors: they read elements and scales, and give an operand that an engine dequantises.

A reader numbers the bytes of the values, in fp32, as if they were stored. It keeps nothing in memory: the scales of a
few rows are read with their elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..kernels.contract import Operand, Scales
from .quantized_tensors import MX_BYTES, MX_COLUMNS, QuantizedTensor
from .reader import ByteReader, FileReader
from .safetensors_header import TensorInfo, element_count
from .strided_reader import StridedReader

ITEM = 4  # the bytes of a value, in fp32
READ_ELEMENTS = 1 << 17  # values that `read` computes at a time


class ScaledReader:
    """The reader of one quantised tensor whose elements follow each other."""

    scattered = False

    def __init__(self, tensor: QuantizedTensor, codes: ByteReader, scales: ByteReader) -> None:
        """Take a tensor and the readers of its elements and of its scales."""
        self._tensor, self._codes, self._scales = tensor, codes, scales

    def operand(self, first: int, n: int, buffer: Any) -> Operand:
        """Return elements [first, first + n) and their scales.

        Args:
            first: The number of the first element.
            n: The number of elements.
            buffer: Memory of at least n bytes for the elements.

        Raises:
            CheckpointError: The file cannot be read.
        """
        import numpy as np

        tensor = self._tensor
        (rows, columns), (height, breadth) = tensor.shape[-2:], tensor.block
        elements = memoryview(buffer).cast("B")[:n]
        self._codes.read(tensor.codes.start + first, elements)
        begin, end = first // columns, (first + n - 1) // columns + 1  # rows of all matrices together
        each = -(-rows // height)  # rows of blocks of a matrix
        lines = [row // rows * each + row % rows // height for row in (begin, end - 1)]
        values = read_scales(self._scales, tensor.scales, lines[0], lines[1] + 1, -(-columns // breadth))
        if rows % height == 0:  # the blocks of all matrices are whole, and so those of all matrices together
            return Operand(
                elements, tensor.dtype, Scales(values, columns, tensor.block, first - lines[0] * height * columns)
            )
        every = np.arange(begin, end)
        by_row = values[every // rows * each + every % rows // height - lines[0]]
        return Operand(elements, tensor.dtype, Scales(by_row, columns, (1, breadth), first - begin * columns))

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the bytes of values in fp32 from byte `start` on. Raises CheckpointError."""
        read_values(self.operand, start, into)

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Give None: the values are in no file."""
        yield None

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading the elements of bytes [start, stop) of the values."""
        first = self._tensor.codes.start
        self._codes.read_ahead(first + start // ITEM, first + -(-stop // ITEM))


class TransposedReader:
    """The reader of one MXFP4 tensor, whose values are transposed: a row has elements of many rows of the file."""

    scattered = True

    def __init__(self, tensor: QuantizedTensor, codes: FileReader, scales: FileReader) -> None:
        """Take a tensor and the readers of the files of its elements and of its scales."""
        self._tensor, self._codes, self._scales = tensor, codes, scales

    def operand(self, first: int, n: int, buffer: Any) -> Operand:
        """Return elements [first, first + n) and their scales, as `ScaledReader.operand` does."""
        import numpy as np

        columns, rows = self._tensor.shape[-2:]  # of a matrix in the file
        groups = columns // MX_COLUMNS
        begin, end = first // rows, -(-(first + n) // rows)  # columns of all matrices together
        low = begin // MX_COLUMNS
        elements = np.empty((end - begin, rows), np.uint8)
        values = np.empty((-(-end // MX_COLUMNS) - low, rows), np.float32)
        for matrix in range(begin // columns, (end - 1) // columns + 1):
            start, stop = max(begin - matrix * columns, 0), min(end - matrix * columns, columns)
            packed = self._box(matrix, self._codes, self._tensor.codes, groups * MX_BYTES, start // 2, -(-stop // 2))
            pairs = np.empty((2 * packed.shape[1], rows), np.uint8)
            pairs[0::2], pairs[1::2] = (packed & 15).T, (packed >> 4).T
            at = matrix * columns + start - begin
            elements[at : at + stop - start] = pairs[start % 2 : start % 2 + stop - start]
            bounds = start // MX_COLUMNS, -(-stop // MX_COLUMNS)
            scales = self._box(matrix, self._scales, self._tensor.scales, groups, *bounds)
            at = matrix * groups + bounds[0] - low
            values[at : at + bounds[1] - bounds[0]] = powers_of_two(scales.T)
        skipped = first - begin * rows
        flat = elements.reshape(-1)[skipped : skipped + n]
        scales_of = Scales(values, rows, (MX_COLUMNS, 1), first - low * MX_COLUMNS * rows)
        return Operand(flat, self._tensor.dtype, scales_of)

    def _box(self, matrix: int, reader: FileReader, tensor: TensorInfo, width: int, start: int, stop: int) -> Any:
        """Return bytes [start, stop) of all rows of one matrix of a tensor, whose rows have `width` bytes."""
        import numpy as np

        rows = self._tensor.shape[-1]
        out = np.empty((rows, stop - start), np.uint8)
        begin = tensor.start + matrix * rows * width + start
        StridedReader(reader, begin, ((rows, width), (stop - start, 1)), 1).read(0, out)
        return out

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the bytes of values in fp32 from byte `start` on. Raises CheckpointError."""
        read_values(self.operand, start, into, len(memoryview(into).cast("B")) // ITEM + 1)

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Give None: the values are in no file."""
        yield None

    def read_ahead(self, start: int, stop: int) -> None:
        """Do nothing: the elements are spread over the file."""


def read_values(operand: Any, start: int, into: Any, most: int = READ_ELEMENTS) -> None:
    """Fill a buffer with the bytes of values in fp32.

    Args:
        operand: A reader's method `operand`.
        start: The first byte of the values; it may lie inside a value.
        into: The buffer.
        most: Values to compute at a time.

    Raises:
        CheckpointError: The file cannot be read.
    """
    import numpy as np

    from ..kernels import convert

    memory = memoryview(into).cast("B")
    first, stop = start // ITEM, -(-(start + len(memory)) // ITEM)
    for at in range(first, stop, most):
        values = np.empty(min(most, stop - at), np.float32)
        convert.dequantize(operand(at, values.size, bytearray(values.size)), values)
        low, high = max(start, at * ITEM), min(start + len(memory), (at + values.size) * ITEM)
        memory[low - start : high - start] = values.data.cast("B")[low - at * ITEM : high - at * ITEM]


def read_scales(reader: ByteReader, tensor: TensorInfo, first: int, stop: int, columns: int) -> Any:
    """Return rows [first, stop) of a tensor of scales as an fp32 array with these columns. Raises CheckpointError."""
    import numpy as np

    from ..kernels.numerics import STORAGE, widen

    item = tensor.nbytes // element_count(tensor.shape)
    stored = np.empty((stop - first) * columns * item, np.uint8)
    reader.read(tensor.start + first * columns * item, stored)
    if tensor.dtype == "F8_E8M0":
        values = powers_of_two(stored)
    else:
        values = widen(stored.view(STORAGE[tensor.dtype]), tensor.dtype)
    return values.reshape(stop - first, columns)


def powers_of_two(exponents: Any) -> Any:
    """Return 2^(exponent - 127) in fp32 for exponents in uint8; 255 means NaN (OCP Microscaling Formats, E8M0)."""
    import numpy as np

    bits = exponents.astype(np.uint32) << np.uint32(23)
    bits[exponents == 0] = 0x00400000  # 2^-127 is subnormal in fp32
    bits[exponents == 255] = 0x7FC00000
    return bits.view(np.float32)
