"""The pass over both models: a merge's, which measures where a merge computes and writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from ..dtypes import BITS, ITEMSIZE
from ..execution.engines import MOST_WORKERS, Engine, choose, cpu_count
from ..execution.lanes import ComputedChunk
from ..execution.tensor_source import WIDEST, TensorSource
from ..execution.worker_pool import CHUNK, Progress, WorkerPool
from ..memory import page_aligned
from ..planning.plan import input_bytes
from ..planning.shards import Chunk, OutputShard, Piece, cut
from ..planning.steps import UNTOUCHED, Action, Step
from .distance import Meter, Sums, total

BLOCK = 1 << 17  # elements read at a time where they are not mapped: whole blocks of distance.py's, for the same bits


def compared(step: Step) -> bool:
    """Whether a tensor's distance is measured; one that the adapter leaves alone has that of 0."""
    untouched = step.reason == UNTOUCHED and step.aligned.dtype in ITEMSIZE
    return step.action is Action.EXTRAPOLATE or untouched


def measure(
    steps: Sequence[Step], shards: Sequence[OutputShard], source: TensorSource, progress: Progress
) -> dict[str, Sums]:
    """Return the sums of every tensor that is compared, by its name.

    Args:
        steps: The fates of the tensors.
        shards: The files in whose order both inputs are read.
        source: The bytes of both inputs.
        progress: Called with (bytes read, bytes to read).
    """
    found: list[tuple[str, Sums]] = []
    engines = (choose("numpy"),) * min(cpu_count(), MOST_WORKERS)
    pool = WorkerPool(source, engines, lambda engine: _Gauge(source, engine, found), lambda *_: None)
    total_bytes, output = input_bytes(steps), max(sum(shard.size for shard in shards), 1)
    pool.run(cut(shards, CHUNK), lambda done: progress(total_bytes * done // output, total_bytes))
    parts = defaultdict(list)
    for name, sums in found:
        parts[name].append(sums)
    return {step.name: total(parts[step.name]) for step in steps if compared(step)}


class _Gauge:
    """The lane of a worker that measures; all of them append to `found`."""

    depth = 1

    def __init__(self, source: TensorSource, engine: Engine, found: list[tuple[str, Sums]]) -> None:
        self._source, self._engine, self._found = source, engine, found
        self._meter = Meter()
        self._buffers = [page_aligned(BLOCK * WIDEST) for _ in range(2)]

    def begin(self, chunk: Chunk) -> None:
        for piece in chunk.pieces:
            if compared(piece.step):
                blocks = self._adapted(piece) if piece.step.delta is not None else self._plain(piece)
                self._found.append((piece.step.name, total(blocks)))

    def finish(self) -> ComputedChunk:
        return ComputedChunk((), {})

    def close(self) -> None:
        pass

    def _plain(self, piece: Piece) -> Iterator[Sums]:
        step = piece.step
        aligned, *others = self._source.spans(step, piece.start, piece.stop)
        sft = others[0] if others else aligned
        dtypes = (step.sft or step.aligned).dtype, step.aligned.dtype
        n = (aligned.stop - aligned.start) * 8 // BITS[dtypes[1]]
        with aligned.mapped() as a, sft.mapped() as s:
            if a is not None and s is not None:
                yield from self._meter.blocks(s, dtypes[0], a, dtypes[1], n)
                return
        for at in range(0, n, BLOCK):
            views, some = [], min(BLOCK, n - at)
            for span, dtype, buffer in zip((sft, aligned), dtypes, self._buffers, strict=True):
                views.append(buffer[: some * ITEMSIZE[dtype]])
                span.reader.read(span.start + at * ITEMSIZE[dtype], views[-1])
            yield from self._meter.blocks(views[0], dtypes[0], views[1], dtypes[1], some)

    def _adapted(self, piece: Piece) -> Iterator[Sums]:
        """base and base + delta, the latter as the merger has it before it rounds."""
        step = piece.step
        work = "F64" if step.aligned.dtype == "F64" else "F32"
        whole = step._replace(action=Action.COPY, sft=None, alphas=(0.0,), dtype=work)
        item, wide = BITS[step.dtype] // 8, BITS[work] // 8
        for start in range(piece.start // item, piece.stop // item, BLOCK):
            stop = min(start + BLOCK, piece.stop // item)
            base, below = self._buffers[0][: (stop - start) * item], self._buffers[1][: (stop - start) * wide]
            (span,) = self._source.spans(step, start * item, stop * item)
            span.reader.read(span.start, base)
            self._source.compute(self._engine, whole, start * wide, stop * wide, [below])
            yield from self._meter.blocks(base, step.aligned.dtype, below, work, stop - start)
