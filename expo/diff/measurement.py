"""The pass over both checkpoints: a worker pool whose lanes measure the distance of tensors and write nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from ..dtypes import BITS, ITEMSIZE
from ..execution.engines import MOST_WORKERS, choose, cpu_count
from ..execution.lanes import ComputedChunk
from ..execution.tensor_source import WIDEST_BYTES, TensorSource
from ..execution.worker_pool import CHUNK, Progress, WorkerPool
from ..memory import page_aligned
from ..planning.plan import input_bytes
from ..planning.shards import Chunk, OutputShard, Piece, cut
from ..planning.steps import UNTOUCHED, Action, Step
from .distance import BLOCK, DistanceMeter, DistanceSums, total

# Elements that are read at a time from files that cannot be mapped. Whole blocks give the same bits as mapped files.
ELEMENTS_READ = 2 * BLOCK

Measurement = tuple[str, DistanceSums]  # a tensor's name, and the sums of some of its elements


def is_compared(step: Step) -> bool:
    """Return True if the distance of a step's tensors is measured.

    A tensor that an adapter leaves unchanged counts too; its distance is 0.
    """
    is_unchanged = step.reason == UNTOUCHED and step.aligned.dtype in ITEMSIZE
    return step.action is Action.EXTRAPOLATE or is_unchanged


def measure_distances(
    steps: Sequence[Step], shards: Sequence[OutputShard], source: TensorSource, progress: Progress
) -> dict[str, DistanceSums]:
    """Return the sums of every tensor that is compared, by its name in aligned.

    Args:
        steps: The steps of a merge.
        shards: The files in whose order both inputs are read.
        source: The bytes of both inputs.
        progress: Called in this thread with (bytes read, bytes to read).
    """
    measurements: list[Measurement] = []
    engines = (choose("numpy"),) * min(cpu_count(), MOST_WORKERS)
    pool = WorkerPool(source, engines, lambda engine: MeasuringLane(source, measurements), lambda *_: None)
    to_read, output = input_bytes(steps), max(sum(shard.size for shard in shards), 1)
    pool.run(cut(shards, CHUNK), lambda done: progress(to_read * done // output, to_read))
    by_name = defaultdict(list)
    for name, sums in measurements:
        by_name[name].append(sums)
    return {step.name: total(by_name[step.name]) for step in steps if is_compared(step)}


class MeasuringLane:
    """The lane of a worker that measures chunks. All lanes append to one list, in any order."""

    depth = 1

    def __init__(self, source: TensorSource, measurements: list[Measurement]) -> None:
        """Allocate buffers."""
        self._source, self._measurements = source, measurements
        self._meter = DistanceMeter()
        self._buffers = [page_aligned(ELEMENTS_READ * WIDEST_BYTES) for _ in range(2)]

    def begin(self, chunk: Chunk) -> None:
        """Measure the pieces of a chunk."""
        for piece in chunk.pieces:
            if is_compared(piece.step):
                blocks = self._measure_adapted(piece) if piece.step.deltas is not None else self._measure(piece)
                self._measurements.append((piece.step.name, total(blocks)))

    def finish(self) -> ComputedChunk:
        """Return a chunk without buffers: there is nothing to write."""
        return ComputedChunk((), {})

    def close(self) -> None:
        """Do nothing: no work is left when begin() returns."""

    def _measure(self, piece: Piece) -> Iterator[DistanceSums]:
        """Yield the sums of a piece's blocks; a tensor that an adapter leaves unchanged is compared with itself."""
        step = piece.step
        aligned, *others = self._source.spans(step, piece.start, piece.stop)
        sft = others[0] if others else aligned
        dtypes = (step.sft or step.aligned).dtype, step.aligned.dtype
        n = (aligned.stop - aligned.start) * 8 // BITS[dtypes[1]]
        with aligned.mapped() as a, sft.mapped() as s:
            if a is not None and s is not None:
                yield from self._meter.measure(s, dtypes[0], a, dtypes[1], n)
                return
        for at in range(0, n, ELEMENTS_READ):
            views, count = [], min(ELEMENTS_READ, n - at)
            for span, dtype, buffer in zip((sft, aligned), dtypes, self._buffers, strict=True):
                views.append(buffer[: count * ITEMSIZE[dtype]])
                span.reader.read(span.start + at * ITEMSIZE[dtype], views[-1])
            yield from self._meter.measure(views[0], dtypes[0], views[1], dtypes[1], count)

    def _measure_adapted(self, piece: Piece) -> Iterator[DistanceSums]:
        """Yield the sums of the blocks of two tensors with deltas, which are not rounded to an output's dtype."""
        item = BITS[piece.step.dtype] // 8
        for start in range(piece.start // item, piece.stop // item, ELEMENTS_READ):
            stop = min(start + ELEMENTS_READ, piece.stop // item)
            made = self._source.conversion(piece.step, start, stop)
            yield from self._meter.measure(made.sft(), made.arithmetic, made.aligned, made.arithmetic, stop - start)
