"""One rank's part of a merge: compute chunks, write them, record them in the journal, and verify them on the disk."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

from ..errors import OutputError
from ..execution.engines import engine_to_verify
from ..execution.make_lanes import LaneMaker
from ..execution.worker_pool import Progress, WorkerPool
from ..memory import page_aligned
from ..output.direct_io import ShardWriter, read_back
from ..output.journal import DoneChunks, Journal
from ..planning.shards import Chunk, ChunkStatistics, portion
from .job import MergeJob
from .result import Tally

Files = Mapping[str, ShardWriter]  # the files of one output, by the name of the shard


class Corrupt(OutputError):
    """An error for bytes on the disk that differ from the written ones; no merge may resume from them."""


class RankWorker:
    """The writer of one rank's chunks into shards that exist in their full size.

    Attributes:
        resumed: Bytes of output that an interrupted merge has made durable.
        shares: Bytes of output that each engine has computed or copied, by the engine's name.
        notes: Warnings about GPUs that failed, in order, each once. The values of the dictionary mean nothing.
    """

    def __init__(self, job: MergeJob, journal: Journal, tally: Tally, chunk_bytes: int, done: DoneChunks) -> None:
        """Prepare this rank's part.

        Args:
            job: The merge.
            journal: The journal of this rank.
            tally: The statistics to which this rank's chunks are added.
            chunk_bytes: The size of a chunk in bytes, which is the same on all ranks.
            done: The chunks that an interrupted merge has made durable.
        """
        self._job, self._journal, self._tally = job, journal, tally
        self._chunk_bytes, self._done = chunk_bytes, done
        self._folders = job.staged
        self._files: dict[int, Files] = {}
        self.resumed = sum(stop - start for (_, start), (stop, _) in done.items()) * len(job.outs)
        self.shares: dict[str, int] = {}
        self.notes = dict.fromkeys(engine.note for engine in job.engines if engine.note)
        self._local = threading.local()  # the buffer of each worker that verifies

    @property
    def direct(self) -> bool:
        """True if all files were written with O_DIRECT."""
        return all(writer.direct for files in self._files.values() for writer in files.values())

    def compute(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute and write this rank's chunks that are not durable yet.

        Args:
            progress: Called with (bytes of output that are done, as far as this rank knows; bytes of output in all).
            cancel: Stops the computation when any thread sets it.

        Raises:
            ExpoError: `WorkerPool.run` or `record` has failed, or another rank has failed.
        """
        plan = self._job.plan
        missing: Counter[str] = Counter()
        for chunk in self._own_chunks(self._done):
            missing[chunk.shard.name] += chunk.stop - chunk.start
        sizes = {shard.name: shard.size for shard in plan.shards}
        for k, folder in self._folders.items():
            self._files[k] = {
                name: ShardWriter(os.path.join(folder, name), sizes[name], count) for name, count in missing.items()
            }

        def record_chunk(chunk: Chunk, statistics: ChunkStatistics) -> None:
            self._tally.add_chunk(chunk, statistics)
            self._journal.add(chunk, statistics)

        def report(count: int) -> None:
            progress(self.resumed + self._job.ranks.report_progress(count), plan.output_bytes)
            if self._journal.due:
                self.record()

        engines, source = self._job.engines, self._job.source
        make_lane = LaneMaker(engines, plan, source, self._chunk_bytes, measure=True)
        pool = WorkerPool(source, engines, make_lane, self._write, record_chunk)
        pool.run(self._own_chunks(self._done), report, cancel)
        self.record()
        self._journal.close()
        self.shares = pool.shares
        self.notes |= make_lane.notes

    def verify(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute this rank's part again, by another engine, and compare it with the bytes on the disk.

        Args:
            progress: Called with (bytes of output that are compared, bytes of output in all).
            cancel: Stops the comparison when any thread sets it.

        Raises:
            Corrupt: A byte on the disk differs; the journal is invalid from then on.
            ExpoError: `WorkerPool.run` has failed, or another rank has failed.
        """
        job, total = self._job, self._job.plan.output_bytes
        engine = engine_to_verify(job.engines)
        engines = (engine,) * len(job.engines)
        make_lane = LaneMaker(engines, job.plan, job.source, self._chunk_bytes, measure=False)
        pool = WorkerPool(job.source, engines, make_lane, partial(self._compare, engine.name))
        try:
            pool.run(self._own_chunks({}), lambda count: progress(job.ranks.report_progress(count), total), cancel)
        except Corrupt:
            self._journal.invalidate()
            raise

    def record(self) -> None:
        """Make the finished chunks durable and write them into the journal.

        Raises:
            CheckpointError: An input has changed, so the chunks since the last record are not written.
            OutputError: The disk refuses a write or a sync.
        """
        self._job.source.check()
        self._journal.flush(self._sync)

    def close(self) -> None:
        """Close all files."""
        for files in self._files.values():
            for writer in files.values():
                writer.close()

    def _own_chunks(self, done: DoneChunks) -> Iterator[Chunk]:
        """Yield the chunks that this rank computes, without the chunks in `done`."""
        ranks = self._job.ranks
        return portion(self._job.plan.shards, self._chunk_bytes, done, ranks.rank, ranks.world)

    def _write(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k in self._files:  # an output that is already in place has no files here
            self._files[k][chunk.shard.name].write(chunk.start, data, chunk.stop - chunk.start)

    def _sync(self, shards: set[str]) -> None:
        for files in self._files.values():
            for name in shards:
                files[name].sync()

    def _compare(self, engine: str, k: int, chunk: Chunk, data: memoryview) -> None:
        """Compare a chunk of output k, which an engine has computed again, with the disk. Raises Corrupt."""
        if k not in self._folders:
            return
        path = os.path.join(self._folders[k], chunk.shard.name)
        expected = data[: chunk.stop - chunk.start]
        if not hasattr(self._local, "buffer"):
            self._local.buffer = page_aligned(self._chunk_bytes)
        actual = self._local.buffer[: read_back(path, chunk.start, self._local.buffer)][: len(expected)]
        if actual != expected:
            offset = next((i for i, (x, y) in enumerate(zip(actual, expected, strict=False)) if x != y), len(actual))
            raise Corrupt(
                f"{path}: byte {chunk.start + offset}, {_describe(chunk, offset)}, does not read back as "
                f"`engine={engine!r}` computes it again: the disk returns other bytes than were written, or an engine "
                "computes wrong bits"
            )


def _describe(chunk: Chunk, offset: int) -> str:
    """Return the part of the file that a byte of a chunk belongs to: the byte of a tensor, or the header."""
    pieces = [piece for piece in chunk.pieces if piece.at <= offset]
    if not pieces:
        return "in the header"
    step, start, _, first = pieces[-1]
    return f"byte {start + offset - first} of tensor {step.label}"
