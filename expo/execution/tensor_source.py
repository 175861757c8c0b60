"""Read both checkpoints' bytes, and compute any run of a step's output bytes from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.reader import ByteReader, FileReader
from ..checkpoints.scaled_reader import ScaledReader, TransposedReader
from ..dtypes import BITS
from ..errors import EngineError
from ..kernels.contract import Operand, Statistics, extrapolation, total_statistics
from ..memory import page_aligned
from ..planning.shards import Piece
from ..planning.steps import Step
from .engines import Engine

if TYPE_CHECKING:
    from ..checkpoints.adapter import LowRank
    from ..checkpoints.checkpoint import Checkpoint
    from .conversion import Conversion

# The size of a block of an input that is not mapped. Blocks of both inputs fit into the second-level cache.
READ_BYTES = 256 << 10
WIDEST_BYTES = 8  # of one element of the widest dtype
# The number of elements that a worker converts at a time, the fastest of 2^15 to 2^19: larger blocks do not fit into
# the cache, and smaller blocks spend more time in Python.
CONVERTED_ELEMENTS = 1 << 17
# The memory of a worker that converts: two inputs, and at most seven fp32 or fp64 arrays that are computed from them.
CONVERSION_BYTES = 9 * CONVERTED_ELEMENTS * WIDEST_BYTES
MOST_FACTORS = 8  # the number of deltas whose matrices stay in memory, because neighbouring chunks need the same ones


class Span(NamedTuple):
    """Bytes [start, stop) that a reader reads: a run of a tensor's bytes in one input.

    Attributes:
        reader: The reader of the shard, or of a tensor whose elements do not follow each other in its file.
        start: The first byte, counted as the reader counts.
        stop: The byte after the last.
    """

    reader: ByteReader
    start: int
    stop: int

    def mapped(self) -> AbstractContextManager[memoryview | None]:
        """Return a context with the bytes mapped into memory, or with None if they cannot be mapped safely."""
        return self.reader.mapped(self.start, self.stop)


class Elements:
    """The elements of one input's span, which are read block by block, or all at once if they are scattered."""

    def __init__(self, span: Span, dtype: str, buffer: memoryview) -> None:
        """Describe the elements.

        Args:
            span: The place of the elements.
            dtype: The dtype of the elements; F32 if they are values that are computed from quantised ones.
            buffer: Memory for a block.
        """
        self._span, self._dtype, self._buffer = span, dtype, buffer
        self._item = BITS[dtype] // 8
        self._whole: Operand | None = None

    def block(self, first: int, count: int) -> Operand:
        """Return elements [first, first + count) of the span. Raises CheckpointError."""
        if not self._span.reader.scattered:
            return self._read(first, count, self._buffer)
        if self._whole is None:
            n = (self._span.stop - self._span.start) // self._item
            self._whole = self._read(0, n, memoryview(bytearray(n * self._item)))
        memory, dtype, scales = self._whole
        item = self._whole.itemsize
        moved = scales and scales._replace(first=scales.first + first)
        return Operand(memory[first * item : (first + count) * item], dtype, moved)

    def _read(self, first: int, count: int, buffer: memoryview) -> Operand:
        reader, start = self._span.reader, self._span.start + first * self._item
        if isinstance(reader, ScaledReader | TransposedReader):
            return reader.operand(start // self._item, count, buffer)
        memory = buffer[: count * self._item]
        reader.read(start, memory)
        return Operand(memory, self._dtype)


class TensorSource:
    """A reader of both inputs, which can compute any run of a step's output bytes; any number of threads may use it."""

    def __init__(self, sft: Checkpoint, aligned: Checkpoint) -> None:
        """Take both inputs; nothing is read before the first call of a method."""
        self._sft = sft
        self._aligned = aligned
        self._scratch = threading.local()
        self._factors = lru_cache(MOST_FACTORS)(self._read_factors)
        adapters = {id(each): each for checkpoint in (sft, aligned) for each in checkpoint.adapters}.values()
        self._adapter_shards = {adapter.shard.path: adapter.shard for adapter in adapters}
        # All workers need a tensor's matrices at the same time, and one of them reads the matrices for all.
        self._factors_lock = threading.Lock()

    def read_ahead(self, piece: Piece) -> None:
        """Ask the system to start reading the inputs' bytes of a piece."""
        for span in self.spans(piece.step, piece.start, piece.stop):
            span.reader.read_ahead(span.start, span.stop)

    def yield_to_writers(self) -> None:
        """Unmap each input file that another process wants to write to; the caller repeats this regularly."""
        for reader in self._readers():
            reader.answer_lease_break()

    def check(self) -> None:
        """Raise CheckpointError if an input file has changed since its header was read."""
        for reader in self._readers():
            reader.check()

    def _readers(self) -> Iterator[FileReader]:
        return (file.reader for inputs in (self._sft, self._aligned) for file in inputs.weight_files.values())

    def spans(self, step: Step, start: int, stop: int) -> list[Span]:
        """Return the inputs' bytes for bytes [start, stop) of the step's output.

        Returns:
            The span of aligned, and the span of sft if the step is no copy. A step whose deltas share a base has one
            span, of the base.
        """
        bits = BITS[step.dtype]
        spans = []
        for checkpoint, tensor in ((self._aligned, step.aligned), (self._sft, None if step.shares_base else step.sft)):
            if tensor is not None:
                low, high = (tensor.start + at * BITS[tensor.dtype] // bits for at in (start, stop))
                reader = self._aligned.reader(step.name) if checkpoint is self._aligned else None
                spans.append(Span(reader or self._sft.reader(tensor.name), low, high))
        return spans

    def compute(
        self, engine: Engine, step: Step, start: int, stop: int, outs: Sequence[Any], measure: bool = False
    ) -> Statistics | None:
        """Fill outs[k] with bytes [start, stop) of the step's output k.

        Args:
            engine: The engine that computes.
            step: The step of the output.
            start: The first byte, counted from the first byte of the step's output; it begins an element.
            stop: The byte after the last; it ends an element.
            outs: One buffer of stop - start bytes for each alpha.
            measure: True to return statistics.

        Returns:
            The statistics of the outputs that `step.counted` lists; None without `measure`, and for a plain copy.

        Raises:
            EngineError: The engine failed.
            CheckpointError: An input cannot be read, or has changed.
        """
        if not step.plain:
            return self._convert(engine, step, start, stop, outs, measure)
        active = step.active
        aligned, *sft = self.spans(step, start, stop)
        copies = [out for k, out in enumerate(outs) if k not in active]
        if copies:
            aligned.reader.read(aligned.start, copies[0])
            for out in copies[1:]:
                out[:] = copies[0]
        if not active:
            return None
        call = EngineCall(engine, step, active, [outs[k] for k in active], measure)
        with aligned.mapped() as a, sft[0].mapped() as s:
            if a is None or s is None:
                return self._call_in_blocks(call, sft[0], aligned)
            assert step.sft is not None
            return call(Operand(s, step.sft.dtype), Operand(a, step.aligned.dtype), 0)

    def _call_in_blocks(self, call: EngineCall, sft: Span, aligned: Span) -> Statistics | None:
        """Call the engine for spans that are not mapped: read block by block into buffers that stay in the cache."""
        assert call.step.sft is not None
        dtypes = call.step.sft.dtype, call.step.aligned.dtype
        item = BITS[dtypes[1]] // 8
        n = (aligned.stop - aligned.start) // item
        most = READ_BYTES // max(BITS[dtype] // 8 for dtype in dtypes)  # elements of a block
        inputs = [Elements(*each) for each in zip((sft, aligned), dtypes, self._buffers(READ_BYTES), strict=True)]
        parts = []
        for at in range(0, n, most):
            blocks = [each.block(at, min(most, n - at)) for each in inputs]
            parts.append(call(blocks[0], blocks[1], at * item))
        measured = [part for part in parts if part is not None]
        return total_statistics(measured, len(call.active)) if call.measure else None

    def _buffers(self, size: int) -> tuple[memoryview, memoryview]:
        """Return this thread's two buffers of `size` bytes each."""
        if not hasattr(self._scratch, "buffers"):
            self._scratch.buffers = {}
        buffers: dict[int, tuple[memoryview, memoryview]] = self._scratch.buffers
        if size not in buffers:
            buffers[size] = page_aligned(size), page_aligned(size)
        return buffers[size]

    def _convert(
        self, engine: Engine, step: Step, start: int, stop: int, outs: Sequence[Any], measure: bool
    ) -> Statistics | None:
        """Fill the outputs of a step that needs a conversion; the arguments are those of `compute`."""
        item, parts = BITS[step.dtype] // 8, []
        elements = self._elements(step, start, stop)
        for low in range(start, stop, CONVERTED_ELEMENTS * item):
            high = min(low + CONVERTED_ELEMENTS * item, stop)
            inputs = [each.block((low - start) // item, (high - low) // item) for each in elements]
            views = [out[low - start : high - start] for out in outs]
            try:
                parts.append(self._conversion(step, low // item, inputs).compute(engine, views, measure))
            except RuntimeError as error:
                raise EngineError(f"`engine={engine.name!r}` failed on {step.name}: {error}") from error
        return total_statistics([part for part in parts if part is not None], len(step.counted)) if measure else None

    def conversion(self, step: Step, first: int, stop: int) -> Conversion:
        """Read elements [first, stop) of a step, at most CONVERTED_ELEMENTS, and return their conversion.

        The conversion uses buffers of this thread, so the next call ends its use.
        """
        item = BITS[step.dtype] // 8
        return self._conversion(
            step, first, [each.block(0, stop - first) for each in self._elements(step, first * item, stop * item)]
        )

    def _conversion(self, step: Step, first: int, inputs: Sequence[Operand]) -> Conversion:
        """Return the conversion of elements of a step, from number `first` on, that are read."""
        from .conversion import Conversion

        with self._factors_lock:
            factors = {delta: self._factors(delta) for delta in step.all_deltas}
        return Conversion(step, first, inputs[0].elements, inputs, factors)

    def _elements(self, step: Step, start: int, stop: int) -> list[Elements]:
        """Return the elements of the inputs for bytes [start, stop) of a step's output, in buffers of this thread."""
        dtypes = step.aligned.dtype, (step.sft or step.aligned).dtype
        buffers = self._buffers(CONVERTED_ELEMENTS * WIDEST_BYTES)
        return [Elements(*each) for each in zip(self.spans(step, start, stop), dtypes, buffers, strict=False)]

    def _read_factors(self, delta: LowRank) -> Any:
        """Return a delta's two matrices in fp32, of shapes [M, r] and [r, N], and its scale."""
        from ..checkpoints.lora_data import read_factors
        from .conversion import factor_in_fp32

        left, right = read_factors(self._adapter_shards[delta.path], delta)
        return factor_in_fp32(left, delta.left.dtype), factor_in_fp32(right, delta.right.dtype), delta.scale


class EngineCall(NamedTuple):
    """A call of an engine for one step; the bytes of the inputs follow later, all at once or in blocks.

    Attributes:
        engine: The engine.
        step: The step.
        active: The numbers of the outputs that the engine computes.
        outs: The memory of each of these outputs.
        measure: True to return statistics.
    """

    engine: Engine
    step: Step
    active: Sequence[int]
    outs: Sequence[Any]
    measure: bool

    def __call__(self, sft: Operand, aligned: Operand, at: int) -> Statistics | None:
        """Compute the elements of both inputs, and write them from byte `at` of each output on.

        Raises:
            EngineError: The engine failed.
        """
        step = self.step
        size = aligned.elements * BITS[step.dtype] // 8
        outs = [out[at : at + size] for out in self.outs]
        alphas = [step.alphas[k] for k in self.active]
        try:
            return self.engine.run(*extrapolation(sft, aligned, alphas), outs, self.measure)
        except RuntimeError as error:
            raise EngineError(f"`engine={self.engine.name!r}` failed on {step.name}: {error}") from error
