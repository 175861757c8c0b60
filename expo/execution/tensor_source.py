"""Both checkpoints' bytes, and a step's bytes of output computed from any run of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.reader import ByteReader, FileReader
from ..dtypes import BITS
from ..errors import EngineError
from ..kernels.contract import Operand, Statistics, extrapolation, total
from ..memory import page_aligned
from ..planning.shards import Piece
from ..planning.steps import Step
from .engines import Engine

if TYPE_CHECKING:
    from ..checkpoints.adapter import LowRank
    from ..checkpoints.checkpoint import Checkpoint

READ = 256 << 10  # bytes read of each input at a time where it is not mapped: both stay in the second-level cache
WIDEST = 8  # bytes of an element
CONVERTED = (
    1 << 17
)  # elements converted at a time: of 2^15 to 2^19 it was the fastest, more cost cache, and less Python
CONVERSION_BYTES = 7 * CONVERTED * WIDEST  # bytes that a worker takes for it: inputs, and up to five fp32 or fp64 forms
MOST_FACTORS = 8  # adapters' matrices held at a time; neighbouring chunks need the same


class Span(NamedTuple):
    """Bytes [start, stop) of a tensor's file, or of what stands for one."""

    reader: ByteReader
    start: int
    stop: int

    def mapped(self) -> AbstractContextManager[memoryview | None]:
        return self.reader.mapped(self.start, self.stop)


class TensorSource:
    """Has any run of a step's bytes computed. Safe for any number of threads."""

    def __init__(self, sft: Checkpoint, aligned: Checkpoint) -> None:
        self._sft = sft
        self._aligned = aligned
        self._scratch = threading.local()
        self._factors = lru_cache(MOST_FACTORS)(self._read_factors)
        self._reads_factors = threading.Lock()  # all workers come to a tensor at once: one reads for all

    def read_ahead(self, piece: Piece) -> None:
        """Ask the system to start reading what a piece will need."""
        for span in self.spans(piece.step, piece.start, piece.stop):
            span.reader.read_ahead(span.start, span.stop)

    def yield_to_writers(self) -> None:
        """Let go of inputs that somebody wants to write to; call it now and then."""
        for reader in self._readers():
            reader.answer_lease_break()

    def check(self) -> None:
        """Raise CheckpointError if an input is not what it was when its header was read."""
        for reader in self._readers():
            reader.check()

    def _readers(self) -> Iterator[FileReader]:
        return (file.reader for inputs in (self._sft, self._aligned) for file in inputs.weight_files.values())

    def spans(self, step: Step, start: int, stop: int) -> list[Span]:
        """Where bytes [start, stop) of the step's output come from: aligned's and, but for a copy, sft's.

        Where there is a delta both are the base, which is there once.
        """
        bits = BITS[step.dtype]
        found = []
        for checkpoint, tensor in ((self._aligned, step.aligned), (self._sft, None if step.delta else step.sft)):
            if tensor is not None:
                low, high = (tensor.start + at * BITS[tensor.dtype] // bits for at in (start, stop))
                reader = self._aligned.reader(step.name) if checkpoint is self._aligned else None
                found.append(Span(reader or self._sft.reader(tensor.name), low, high))
        return found

    def compute(
        self, engine: Engine, step: Step, start: int, stop: int, outs: Sequence[Any], measure: bool = False
    ) -> Statistics | None:
        """Fill outs[k], one for each alpha, with bytes [start, stop) of the step's output; cut between elements.

        Statistics of the outputs that are `counted` where `measure`, else None. Raises EngineError, CheckpointError.
        """
        if not step.plain:
            return self._converted(engine, step, start, stop, outs, measure)
        active = step.active
        aligned, *sft = self.spans(step, start, stop)
        copies = [out for k, out in enumerate(outs) if k not in active]
        if copies:
            aligned.reader.read(aligned.start, copies[0])
            for out in copies[1:]:
                out[:] = copies[0]
        if not active:
            return None
        run = Run(engine, step, active, [outs[k] for k in active], measure)
        with aligned.mapped() as a, sft[0].mapped() as s:
            return run(s, a, 0) if a is not None and s is not None else self._in_blocks(run, sft[0], aligned)

    def _in_blocks(self, run: Run, sft: Span, aligned: Span) -> Statistics | None:
        """What cannot be mapped, by way of buffers that stay in the cache."""
        sizes = sft.stop - sft.start, aligned.stop - aligned.start
        n = sizes[1] * 8 // BITS[run.step.aligned.dtype]
        items = [size // max(n, 1) for size in sizes]
        most = READ // max(items)  # elements of a block
        parts = []
        for at in range(0, n, most):
            views = []
            for span, item, buffer in zip((sft, aligned), items, self._buffers(READ), strict=True):
                views.append(buffer[: min(most, n - at) * item])
                span.reader.read(span.start + at * item, views[-1])
            parts.append(run(views[0], views[1], at * items[1]))
        return total([part for part in parts if part is not None], len(run.active)) if run.measure else None

    def _buffers(self, size: int) -> tuple[memoryview, memoryview]:
        """This thread's two, of `size` bytes each."""
        if not hasattr(self._scratch, "buffers"):
            self._scratch.buffers = {}
        held: dict[int, tuple[memoryview, memoryview]] = self._scratch.buffers
        if size not in held:
            held[size] = page_aligned(size), page_aligned(size)
        return held[size]

    def _converted(
        self, engine: Engine, step: Step, start: int, stop: int, outs: Sequence[Any], measure: bool
    ) -> Statistics | None:
        """An output in another dtype than aligned's, or with an adapter's delta: through fp32, rounded once."""
        from . import conversion as converting

        item = BITS[step.dtype] // 8
        with self._reads_factors:
            factors = None if step.delta is None else self._factors(step.delta)
        parts = []
        for low in range(start, stop, CONVERTED * item):
            high = min(low + CONVERTED * item, stop)
            inputs = []
            for span, buffer in zip(self.spans(step, low, high), self._buffers(CONVERTED * WIDEST), strict=False):
                inputs.append(buffer[: span.stop - span.start])
                span.reader.read(span.start, inputs[-1])
            views = [out[low - start : high - start] for out in outs]
            try:
                block = converting.Block(step, low // item, (high - low) // item, inputs, factors)
                parts.append(block.compute(engine, views, measure))
            except RuntimeError as error:
                raise EngineError(f"`engine={engine.name!r}` failed on {step.name}: {error}") from error
        return total([part for part in parts if part is not None], len(step.counted)) if measure else None

    def _read_factors(self, delta: LowRank) -> Any:
        """An adapter's two matrices as fp32 [M, r] and [r, N], and the scale."""
        from ..checkpoints.lora_data import read_factors
        from .conversion import factor_in_fp32

        assert self._aligned.adapter is not None
        left, right = read_factors(self._aligned.adapter.shard, delta)
        return factor_in_fp32(left, delta.left.dtype), factor_in_fp32(right, delta.right.dtype), delta.scale


class Run(NamedTuple):
    """An engine at work on a step: for the outputs `active`, whose memory is `outs`."""

    engine: Engine
    step: Step
    active: Sequence[int]
    outs: Sequence[Any]
    measure: bool

    def __call__(self, sft: memoryview, aligned: memoryview, at: int) -> Statistics | None:
        """Compute from both inputs' bytes into the outputs' from byte `at` on. Raises EngineError."""
        step = self.step
        assert step.sft is not None
        outs = [out[at : at + len(aligned)] for out in self.outs]
        alphas = [step.alphas[k] for k in self.active]
        operands = Operand(sft, step.sft.dtype), Operand(aligned, step.aligned.dtype)
        try:
            return self.engine.run(*extrapolation(*operands, alphas), outs, self.measure)
        except RuntimeError as error:
            raise EngineError(f"`engine={self.engine.name!r}` failed on {step.name}: {error}") from error
