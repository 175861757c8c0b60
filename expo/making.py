"""The outputs of a merge while they are made: staged, journalled, checked, and committed or kept for later."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from .checkpoint import INDEX, Checkpoint
from .engines import Engine
from .errors import CheckpointError, ExpoError, OutputError
from .journal import Done, Journal
from .layout import Chunk, cut
from .plan import CARD, DIGESTS, Plan
from .result import Tally
from .source import Source
from .work import CHUNK, MIB, Measured, Pass, Progress, chunk_size
from .writer import BLOCK, JOURNAL, ShardWriter, Staging, aligned_buffer, output_errors, read_back, sync_folder

Files = Mapping[str, ShardWriter]  # of one output, by the name of the shard


class Corrupt(OutputError):
    """What was written reads back otherwise: there is nothing in it to go on with."""


class Making:
    """The stagings of a merge's outputs, filled; a context that keeps them for --resume when it is left by an error."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        crew: Sequence[Engine],
        stagings: Mapping[int, Staging],
        journal: Journal,
        resume: bool,
    ) -> None:
        """stagings: of the outputs still to be made, by their number. journal: of all outputs.

        resume: go on with what is there. Raises OutputError.
        """
        self._plan = plan
        self._source = source
        self._crew = crew
        self._stagings = stagings
        self._files: dict[int, Files] = {}
        self._journal = journal
        self._chunk = chunk_size(len(crew), len(plan.alphas))
        self._done: Done = {}
        self.tally = Tally(len(plan.alphas))
        self.resumed = 0  # bytes of output that were there already
        self.shares: dict[str, int] = {}
        self._read = threading.local()  # a buffer of each worker that verifies
        begun = self._journal.resume() if resume else None
        goes_on = begun is not None and self._adopt(*begun)
        for staging in stagings.values():
            with output_errors(staging.folder):
                staging.clear(but={JOURNAL, *(name for name, _ in self._done)} if goes_on else ())
        if not goes_on:
            self._journal.begin(self._chunk)

    def _adopt(self, chunk: int, done: Done) -> bool:
        """Take over what an interrupted merge has done; False where its journal does not fit the plan."""
        if chunk % BLOCK or chunk > CHUNK:
            return False
        chunks = {(each.shard.name, each.start): each for each in cut(self._plan.shards, chunk)}
        tally = Tally(len(self._plan.alphas))
        for key, (stop, measured) in done.items():
            if key not in chunks or chunks[key].stop != stop or not tally.add_chunk(chunks[key], measured):
                return False
        self._chunk, self._done, self.tally = chunk, done, tally
        self.resumed = sum(stop - start for (_, start), (stop, _) in done.items()) * len(self._plan.alphas)
        return True

    @property
    def direct(self) -> bool:
        """Whether all of it was written with O_DIRECT."""
        return all(writer.direct for files in self._files.values() for writer in files.values())

    def __enter__(self) -> Making:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if isinstance(error, Corrupt):
                for staging in self._stagings.values():
                    staging.discard()
            elif error is not None:
                self._keep(error)
        finally:
            for files in self._files.values():
                for writer in files.values():
                    writer.close()

    def _keep(self, error: BaseException) -> None:
        """Write down what is done, leave the stagings, and say so."""
        # The disk is full or gone, or an input is not what it was: what was written down before counts.
        with contextlib.suppress(CheckpointError, OutputError):
            self._record()
        left = [staging for staging in self._stagings.values() if not staging.committed]
        if not left:
            self._journal.remove()
        for staging in left:
            staging.keep()
            with contextlib.suppress(OutputError):
                self._journal.put_back(staging.folder)
        done = [staging.out for staging in self._stagings.values() if staging.committed]
        notes = [f"already in place: {', '.join(done)}"] if done else []
        if left:
            kept = ", ".join(staging.folder for staging in left)
            notes.append(f"what is done is kept in {kept}: the same command with --resume goes on")
        if isinstance(error, ExpoError | KeyboardInterrupt) and notes:
            raise type(error)("; ".join([str(error), *notes] if str(error) else notes)) from error

    def _record(self) -> None:
        """Write down what is done, unless an input was changed: what was computed from it must not count."""
        self._source.check()
        self._journal.flush(self._sync)

    def compute(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute and write every chunk that is not there yet. Raises what `Pass.run` raises, and OutputError."""
        durable: Counter[str] = Counter()
        for (name, start), (stop, _) in self._done.items():
            durable[name] += stop - start
        for k, staging in self._stagings.items():
            self._files[k] = {
                shard.name: ShardWriter(staging.path(shard.name), shard, durable[shard.name])
                for shard in self._plan.shards
            }
            with output_errors(staging.folder):  # the journal is about to vouch for these files: their names must last
                sync_folder(staging.folder)
                sync_folder(staging.parent)

        def landed(chunk: Chunk, measured: Measured) -> None:
            self.tally.add_chunk(chunk, measured)
            self._journal.add(chunk, measured)

        def tick(count: int) -> None:
            progress(self.resumed + count, self._plan.output_bytes)
            if self._journal.due:
                self._record()

        work = Pass(self._plan, self._source, self._crew, self._sink, landed, size=self._chunk, skip=self._done)
        work.run(tick, cancel)
        self._record()
        self.shares = work.shares

    def _sink(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k in self._files:  # and not in place already
            self._files[k][chunk.shard.name].write(chunk.start, data, chunk.stop - chunk.start)

    def _sync(self, shards: set[str]) -> None:
        for files in self._files.values():
            for name in shards:
                files[name].sync()

    def verify(self, progress: Progress, cancel: threading.Event | None) -> None:
        """Compute all of it again and compare it with what the disk has. Raises OutputError."""
        total = self._plan.output_bytes
        check = Pass(self._plan, self._source, self._crew, self._compare, size=self._chunk)
        check.run(lambda count: progress(count, total), cancel)

    def _compare(self, k: int, chunk: Chunk, data: memoryview) -> None:
        if k not in self._stagings:
            return
        path = self._stagings[k].path(chunk.shard.name)
        expected = data[: chunk.stop - chunk.start]
        if not hasattr(self._read, "buffer"):
            self._read.buffer = aligned_buffer(self._chunk)
        found = self._read.buffer[: read_back(path, chunk.start, self._read.buffer)][: len(expected)]
        if found != expected:
            at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), len(found))
            pieces = [piece for piece in chunk.pieces if piece.at <= at]
            where = "in the header"
            if pieces:
                step, start, _, first = pieces[-1]
                where = f"byte {start + at - first} of tensor {step.label}"
            raise Corrupt(f"{path}: byte {chunk.start + at}, {where}, reads back otherwise than it was written")

    def complete(self, aligned: Checkpoint, cards: Callable[[int], bytes], digest: bool) -> None:
        """Aligned's other files, the model card, the index, and digests of all if asked for.

        cards: makes the card of an output, by its number. Raises CheckpointError, OutputError.
        """
        for k, staging in self._stagings.items():
            names = [shard.name for shard in self._plan.shards]
            if aligned.folder is not None:
                for name in self._plan.carried:
                    staging.put(name, _parts(aligned.files[name]))
                for name, data in {**self._plan.made, CARD: cards(k)}.items():
                    staging.put(name, [data])
                    names.append(name)
                names += self._plan.carried
            if self._plan.index is not None:
                staging.put(INDEX, [self._plan.index])
                names.append(INDEX)
            if digest and aligned.folder is not None:
                staging.put(DIGESTS, _digests(staging, [(name, name) for name in sorted(names)]))
            elif digest:
                staging.beside(_digests(staging, [(names[0], os.path.basename(staging.out))]))

    def commit(self) -> list[str]:
        """Put the outputs in place, one by one; returns warnings. Raises CheckpointError, OutputError."""
        self._source.check()
        warnings = []
        for staging in self._stagings.values():
            self._journal.set_aside(staging.folder)
            warnings += staging.commit()
        return warnings + self._journal.remove()


def _parts(path: str) -> Iterator[bytes]:
    """A file of aligned's, a MiB at a time. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            while part := file.read(MIB):
                yield part
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _digests(staging: Staging, names: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """Lines as sha256sum writes and checks them, of files read back from staging: (name there, name to write)."""
    buffer = aligned_buffer(CHUNK)
    for staged, name in names:
        path = staging.path(staged)
        digest, at = hashlib.sha256(), 0
        while count := read_back(path, at, buffer):
            digest.update(buffer[:count])
            at += count
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        mark = "\\" if escaped != name else ""  # as sha256sum marks it
        yield os.fsencode(f"{mark}{digest.hexdigest()}  {escaped}\n")
