"""One rank's part of a merge's shards: computed, written, journalled, and compared with what the disk has."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import OutputError
from ..execution.make_lanes import LaneMaker
from ..execution.worker_pool import Progress, WorkerPool
from ..memory import page_aligned
from ..output.direct_io import ShardWriter, read_back
from ..output.journal import DoneChunks, Journal
from ..planning.shards import Chunk, Measured, portion
from .job import MergeJob
from .result import Tally

Files = Mapping[str, ShardWriter]  # one output's files by the name of the shard


class Corrupt(OutputError):
    """The bytes on the disk are not those that were written, so a merge cannot resume from them."""


class RankWorker:
    """One rank's part of the shards, which exist in their full size.

    Attributes:
        resumed: Bytes of output that an interrupted merge has left.
        shares: Bytes of output by the name of the engine that computed them.
        notes: Sentences for warnings about GPUs that failed, each once.
    """

    def __init__(self, job: MergeJob, journal: Journal, tally: Tally, chunk_bytes: int, done: DoneChunks) -> None:
        """Take over this rank's part.

        Args:
            job: The merge.
            journal: The journal of this rank.
            tally: Adds up the statistics of the chunks that are computed here.
            chunk_bytes: The size of a chunk, the same on all ranks.
            done: The chunks that an interrupted merge has made durable.
        """
        self._job, self._journal, self._tally = job, journal, tally
        self._chunk_bytes, self._done = chunk_bytes, done
        self._folders = job.staged
        self._files: dict[int, Files] = {}
        self.resumed = sum(stop - start for (_, start), (stop, _) in done.items()) * len(job.outs)
        self.shares: dict[str, int] = {}
        self.notes = dict.fromkeys(engine.note for engine in job.engines if engine.note)
        self._local = threading.local()  # each worker that verifies has a buffer

    @property
    def direct(self) -> bool:
        """True if all files were written with O_DIRECT."""
        return all(writer.direct for files in self._files.values() for writer in files.values())

    def compute(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute and write every chunk that is not there yet. Raises what `WorkerPool.run` and `record` raise."""
        plan = self._job.plan
        missing: Counter[str] = Counter()
        for chunk in self._portion(self._done):
            missing[chunk.shard.name] += chunk.stop - chunk.start
        sizes = {shard.name: shard.size for shard in plan.shards}
        for k, folder in self._folders.items():
            self._files[k] = {
                name: ShardWriter(os.path.join(folder, name), sizes[name], count) for name, count in missing.items()
            }

        def landed(chunk: Chunk, measured: Measured) -> None:
            self._tally.add_chunk(chunk, measured)
            self._journal.add(chunk, measured)

        def tick(count: int) -> None:
            progress(self.resumed + self._job.ranks.report(count), plan.output_bytes)
            if self._journal.due:
                self.record()

        make_lane = LaneMaker(plan, self._job.source, self._chunk_bytes, measure=True)
        pool = WorkerPool(self._job.source, self._job.engines, make_lane, self._write, landed)
        pool.run(self._portion(self._done), tick, cancel)
        self.record()
        self._journal.close()
        self.shares = pool.shares
        self.notes |= make_lane.notes

    def verify(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute this rank's part again and compare it with what the disk has. Raises Corrupt, RankError."""
        job, total = self._job, self._job.plan.output_bytes
        make_lane = LaneMaker(job.plan, job.source, self._chunk_bytes, measure=False)
        pool = WorkerPool(job.source, job.engines, make_lane, self._compare)
        try:
            pool.run(self._portion({}), lambda count: progress(job.ranks.report(count), total), cancel)
        except Corrupt:
            self._journal.invalidate()
            raise
        self.notes |= make_lane.notes

    def record(self) -> None:
        """Write the finished chunks into the journal, unless an input was changed: such chunks must not count.

        Raises:
            CheckpointError: An input was changed.
            OutputError: The disk refuses a write or a sync.
        """
        self._job.source.check()
        self._journal.flush(self._sync)

    def close(self) -> None:
        """Close all files."""
        for files in self._files.values():
            for writer in files.values():
                writer.close()

    def _portion(self, done: DoneChunks) -> Iterator[Chunk]:
        ranks = self._job.ranks
        return portion(self._job.plan.shards, self._chunk_bytes, done, ranks.rank, ranks.world)

    def _write(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k in self._files:  # an output that is in place already has none
            self._files[k][chunk.shard.name].write(chunk.start, data, chunk.stop - chunk.start)

    def _sync(self, shards: set[str]) -> None:
        for files in self._files.values():
            for name in shards:
                files[name].sync()

    def _compare(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k not in self._folders:
            return
        path = os.path.join(self._folders[k], chunk.shard.name)
        expected = data[: chunk.stop - chunk.start]
        if not hasattr(self._local, "buffer"):
            self._local.buffer = page_aligned(self._chunk_bytes)
        found = self._local.buffer[: read_back(path, chunk.start, self._local.buffer)][: len(expected)]
        if found != expected:
            at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), len(found))
            raise Corrupt(
                f"{path}: byte {chunk.start + at}, {_place_in(chunk, at)}, reads back otherwise than it was written"
            )


def _place_in(chunk: Chunk, at: int) -> str:
    """Return the words for byte `at` of a chunk: the tensor that it belongs to, or the header."""
    pieces = [piece for piece in chunk.pieces if piece.at <= at]
    if not pieces:
        return "in the header"
    step, start, _, first = pieces[-1]
    return f"byte {start + at - first} of tensor {step.label}"
