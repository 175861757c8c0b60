"""The shards of a merge's outputs, filled: computed, written, journalled and compared, by one rank's part of them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..errors import OutputError
from ..execution.engines import Engine
from ..execution.tensor_source import Source
from ..execution.worker_pool import Pass, Progress
from ..memory import page_aligned
from ..output.direct_io import ShardWriter, read_back
from ..output.journal import DoneChunks, Journal
from ..planning.plan import Plan
from ..planning.shards import Chunk, Measured, portion
from .process_group import Alone
from .result import Tally

Files = Mapping[str, ShardWriter]  # of one output, by the name of the shard


class Corrupt(OutputError):
    """What was written reads back otherwise: there is nothing in it to go on with."""


class Filling:
    """One rank's part of the shards, which are there in their full size.

    shares: bytes of output by engine. notes: sentences for warnings, about GPUs that failed, each once.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        crew: Sequence[Engine],
        folders: Mapping[int, str],
        journal: Journal,
        ranks: Alone,
        tally: Tally,
        chunk: int,
        done: DoneChunks,
    ) -> None:
        """folders: the stagings of the outputs still to be made, by their number. chunk: bytes. done: not to be done.

        tally: takes the statistics of what is computed here.
        """
        self._plan, self._source, self._crew, self._folders = plan, source, crew, folders
        self._journal, self._ranks = journal, ranks
        self._chunk, self._done = chunk, done
        self._files: dict[int, Files] = {}
        self._tally = tally
        self.resumed = sum(stop - start for (_, start), (stop, _) in done.items()) * len(plan.alphas)
        self.shares: dict[str, int] = {}
        self.notes = dict.fromkeys(engine.note for engine in crew if engine.note)
        self._read = threading.local()  # a buffer of each worker that verifies

    @property
    def direct(self) -> bool:
        """Whether all of it was written with O_DIRECT."""
        return all(writer.direct for files in self._files.values() for writer in files.values())

    def compute(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute and write every chunk that is not there yet. Raises what `Pass.run` and `record` do, RankError."""
        missing: Counter[str] = Counter()
        for chunk in self._portion(self._done):
            missing[chunk.shard.name] += chunk.stop - chunk.start
        sizes = {shard.name: shard.size for shard in self._plan.shards}
        for k, folder in self._folders.items():
            self._files[k] = {
                name: ShardWriter(os.path.join(folder, name), sizes[name], count) for name, count in missing.items()
            }

        def landed(chunk: Chunk, measured: Measured) -> None:
            self._tally.add_chunk(chunk, measured)
            self._journal.add(chunk, measured)

        def tick(count: int) -> None:
            progress(self.resumed + self._ranks.report(count), self._plan.output_bytes)
            if self._journal.due:
                self.record()

        chunks = self._portion(self._done)
        work = Pass(self._plan, self._source, self._crew, self._sink, landed, chunks=chunks, size=self._chunk)
        work.run(tick, cancel)
        self.record()
        self._journal.close()
        self.shares = work.shares
        self.notes |= work.notes

    def verify(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute this rank's part again and compare it with what the disk has. Raises Corrupt, RankError."""
        total = self._plan.output_bytes
        chunks = self._portion({})
        check = Pass(self._plan, self._source, self._crew, self._compare, chunks=chunks, size=self._chunk)
        try:
            check.run(lambda count: progress(self._ranks.report(count), total), cancel)
        except Corrupt:
            self._journal.invalidate()
            raise
        self.notes |= check.notes

    def record(self) -> None:
        """Write down what is done, unless an input was changed: what was computed from it must not count.

        Raises CheckpointError, OutputError.
        """
        self._source.check()
        self._journal.flush(self._sync)

    def close(self) -> None:
        for files in self._files.values():
            for writer in files.values():
                writer.close()

    def _portion(self, done: DoneChunks) -> Iterator[Chunk]:
        return portion(self._plan.shards, self._chunk, done, self._ranks.rank, self._ranks.world)

    def _sink(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k in self._files:  # and not in place already
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
        if not hasattr(self._read, "buffer"):
            self._read.buffer = page_aligned(self._chunk)
        found = self._read.buffer[: read_back(path, chunk.start, self._read.buffer)][: len(expected)]
        if found != expected:
            at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), len(found))
            pieces = [piece for piece in chunk.pieces if piece.at <= at]
            where = "in the header"
            if pieces:
                step, start, _, first = pieces[-1]
                where = f"byte {start + at - first} of tensor {step.label}"
            raise Corrupt(f"{path}: byte {chunk.start + at}, {where}, reads back otherwise than it was written")
