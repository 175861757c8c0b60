"""The outputs of a merge while they are made: staged, filled, completed, and committed or kept for later."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ..checkpoints.checkpoint import INDEX, Checkpoint
from ..checkpoints.sidecars import CARD, DIGESTS
from ..errors import CheckpointError, ExpoError, OutputError, RankError
from ..execution.engines import Engine
from ..execution.tensor_source import Source
from ..execution.worker_pool import CHUNK, chunk_size
from ..memory import MIB, PAGE, page_aligned
from ..output.atomic import sync_folder
from ..output.direct_io import create_shard, read_back
from ..output.journal import ChunkKey, DoneChunks, Journal
from ..output.os_errors import output_errors
from ..output.staging import JOURNAL, Staging
from ..planning.plan import Plan
from ..planning.shards import cut
from .process_group import Alone
from .rank_worker import Corrupt, Filling
from .result import Tally

GOES_ON = "the same command with --resume goes on"


class Making:
    """The stagings of a merge's outputs, in the hands of rank 0; left by an error it keeps them for --resume.

    filling: what computes this rank's part. tally: statistics of what is done.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        crew: Sequence[Engine],
        stagings: Mapping[int, Staging],
        journal: Journal,
        ranks: Alone,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """stagings: of the outputs still to be made, by their number. journal: of all outputs.

        resume: go on with what is there; overwrite: unless it is another merge's. Raises OutputError.
        """
        self._plan = plan
        self._source = source
        self._stagings = stagings
        self._journal = journal
        self._chunk = chunk_size(len(crew), len(plan.alphas))
        self._done: DoneChunks = {}
        self.tally = Tally(len(plan.alphas))
        self._ranks = ranks
        begun = self._journal.resume(overwrite) if resume else None
        goes_on = begun is not None and self._adopt(begun.chunk_size, begun.done)
        for staging in stagings.values():
            with output_errors(staging.folder):
                staging.clear(keep={JOURNAL, *(name for name, _ in self._done)} if goes_on else ())
        if not goes_on:
            self._journal.begin(self._chunk)
        folders = {k: staging.folder for k, staging in stagings.items()}
        self.filling = Filling(plan, source, crew, folders, journal, ranks, self.tally, self._chunk, self._done)

    def _adopt(self, chunk: int, done: DoneChunks) -> bool:
        """Take over what an interrupted merge has done; False where its journal does not fit the plan."""
        tally = Tally(len(self._plan.alphas))
        if chunk % PAGE or chunk > CHUNK or not self._add(tally, chunk, done):
            return False
        self._chunk, self._done, self.tally = chunk, done, tally
        return True

    def _add(self, tally: Tally, size: int, done: DoneChunks) -> bool:
        """The statistics of these chunks into the tally; False where they are no chunks of the plan's."""
        left = len(done)
        for chunk in cut(self._plan.shards, size):
            if not left:
                break
            stop, measured = done.get((chunk.shard.name, chunk.start), (None, {}))
            if stop is None:
                continue
            if stop != chunk.stop or not tally.add_chunk(chunk, measured):
                return False
            left -= 1
        return left == 0

    def __enter__(self) -> Making:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        cause = self._ranks.cause(error)
        try:
            if isinstance(cause, Corrupt) or (isinstance(cause, RankError) and cause.kind == Corrupt.__name__):
                for staging in self._stagings.values():
                    staging.discard()
            elif cause is not None:
                self._keep(cause)
            if cause is not None and cause is not error:
                raise cause
        finally:
            self.filling.close()

    def _keep(self, error: BaseException) -> None:
        """Write down what is done, leave the stagings, and say so."""
        # The disk is full or gone, or an input is not what it was: what was written down before counts.
        with contextlib.suppress(CheckpointError, OutputError):
            self.filling.record()
        left = [staging for staging in self._stagings.values() if not staging.committed]
        if not left:
            self._journal.remove()
        for staging in left:
            staging.keep()
            with contextlib.suppress(OutputError):
                self._journal.move_into_staging(staging.folder)
        done = [staging.out for staging in self._stagings.values() if staging.committed]
        notes = [f"already in place: {', '.join(done)}"] if done else []
        if left:
            kept = ", ".join(staging.folder for staging in left)
            command = "--resume without --check puts it in place as it is" if _unloadable(error) else GOES_ON
            notes.append(f"what is done is kept in {kept}: {command}")
        if isinstance(error, ExpoError | KeyboardInterrupt) and notes:
            raise type(error)("; ".join([str(error), *notes] if str(error) else notes)) from error

    def create(self) -> None:
        """Make the shards that are not there yet, so that all ranks may fill them. Raises OutputError."""
        durable: Counter[str] = Counter()
        for (name, start), (stop, _) in self._done.items():
            durable[name] += stop - start
        for staging in self._stagings.values():
            for shard in self._plan.shards:
                create_shard(staging.path(shard.name), shard.size, durable[shard.name])
            with output_errors(staging.folder):  # the journal is about to vouch for these files: their names must last
                sync_folder(staging.folder)
                sync_folder(staging.parent)

    @property
    def begun(self) -> tuple[int, dict[ChunkKey, int]]:
        """What the other ranks must know to divide the rest as this one does: the size of chunks, and those done.

        Not for them to read in the journal, which this rank may have written more into by then.
        """
        return self._chunk, {key: stop for key, (stop, _) in self._done.items()}

    def collect(self) -> None:
        """Take over what the other ranks have done, once all have. Raises OutputError."""
        there = self.filling.resumed + sum(self.filling.shares.values())
        sound = True
        for done in self._journal.collect(self._chunk):
            there += sum(stop - start for (_, start), (stop, _) in done.items()) * len(self._plan.alphas)
            sound = sound and self._add(self.tally, self._chunk, done)
        if not sound or there != self._plan.output_bytes:
            folders = ", ".join(staging.folder for staging in self._stagings.values())
            raise OutputError(f"{folders}: a rank's journal cannot be read, or not all of it")

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
                staging.put_digest(_digests(staging, [(names[0], os.path.basename(staging.out))]))

    def check(self, loader: Any) -> None:
        """Have this class of transformers load each output where it is staged. Raises Unloadable."""
        from .load_check import check_output

        for staging in self._stagings.values():
            check_output(loader, staging.folder, staging.out)

    def commit(self) -> list[str]:
        """Put the outputs in place, one by one; returns warnings. Raises CheckpointError, OutputError."""
        self._source.check()
        warnings = []
        for staging in self._stagings.values():
            self._journal.move_beside_output(staging.folder)
            warnings += staging.commit()
        return warnings

    def forget(self) -> list[str]:
        """Remove the journal, once nobody has to be told any more that the outputs are in place; returns warnings."""
        return self._journal.remove()


def _unloadable(error: BaseException) -> bool:
    """Whether --check failed, as it would again."""
    from .load_check import Unloadable

    return isinstance(error, Unloadable)


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
    buffer = page_aligned(CHUNK)
    for staged, name in names:
        path = staging.path(staged)
        digest, at = hashlib.sha256(), 0
        while count := read_back(path, at, buffer):
            digest.update(buffer[:count])
            at += count
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        mark = "\\" if escaped != name else ""  # as sha256sum marks it
        yield os.fsencode(f"{mark}{digest.hexdigest()}  {escaped}\n")
