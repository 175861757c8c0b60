"""Rank 0 of a merge: it stages the outputs, lets all ranks fill them, completes them, and commits or keeps them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ..checkpoints.files import INDEX
from ..checkpoints.sidecars import CARD, DIGESTS
from ..errors import CheckpointError, ExpoError, OutputError, RankError
from ..execution.worker_pool import CHUNK
from ..memory import MIB, PAGE, page_aligned
from ..output.atomic import sync_folder
from ..output.direct_io import create_shard, read_back
from ..output.journal import ChunkKey, DoneChunks, Journal
from ..output.os_errors import output_errors
from ..output.staging import JOURNAL, Staging
from ..planning.shards import cut
from .job import MergeJob
from .rank_worker import Corrupt, RankWorker
from .result import Tally

RESUME = "the same command with --resume goes on"


class Coordinator:
    """The staging folders of a merge's outputs; after an error they stay for `--resume`.

    Attributes:
        worker: Computes this rank's part.
        tally: The statistics of the chunks that are done.
    """

    def __init__(self, job: MergeJob, stagings: Mapping[int, Staging], journal: Journal) -> None:
        """Continue with what the journal says is done, or begin anew. Raises OutputError.

        Args:
            job: The merge.
            stagings: The staging folders of the outputs still to be made, by the output's number.
            journal: The journal of all outputs.
        """
        self._job, self._stagings, self._journal = job, stagings, journal
        self._chunk_bytes = job.chunk_bytes
        self._done: DoneChunks = {}
        self.tally = Tally(len(job.outs))
        begun = journal.resume(job.options.overwrite) if job.options.resume else None
        continues = begun is not None and self._adopt(begun.chunk_size, begun.done)
        for staging in stagings.values():
            with output_errors(staging.folder):
                staging.clear(keep={JOURNAL, *(name for name, _ in self._done)} if continues else ())
        if not continues:
            journal.begin(self._chunk_bytes)
        self.worker = RankWorker(job, journal, self.tally, self._chunk_bytes, self._done)

    def _adopt(self, chunk_bytes: int, done: DoneChunks) -> bool:
        """Take over what an interrupted merge has done; return False where its journal does not fit the plan."""
        tally = Tally(len(self._job.outs))
        if chunk_bytes % PAGE or chunk_bytes > CHUNK or not self._add(tally, chunk_bytes, done):
            return False
        self._chunk_bytes, self._done, self.tally = chunk_bytes, done, tally
        return True

    def _add(self, tally: Tally, chunk_bytes: int, done: DoneChunks) -> bool:
        """Add the statistics of these chunks to the tally; return False where they are no chunks of the plan."""
        left = len(done)
        for chunk in cut(self._job.plan.shards, chunk_bytes):
            if not left:
                break
            stop, measured = done.get((chunk.shard.name, chunk.start), (None, {}))
            if stop is None:
                continue
            if stop != chunk.stop or not tally.add_chunk(chunk, measured):
                return False
            left -= 1
        return left == 0

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        cause = self._job.ranks.cause(error)
        try:
            if isinstance(cause, Corrupt) or (isinstance(cause, RankError) and cause.kind == Corrupt.__name__):
                for staging in self._stagings.values():
                    staging.discard()
            elif cause is not None:
                self._keep(cause)
            if cause is not None and cause is not error:
                raise cause
        finally:
            self.worker.close()

    def _keep(self, error: BaseException) -> None:
        """Record what is done, leave the staging folders, and add to the error what is left and how to continue."""
        # The disk may be full or gone, or an input may have changed: what the journal has already still counts.
        with contextlib.suppress(CheckpointError, OutputError):
            self.worker.record()
        left = [staging for staging in self._stagings.values() if not staging.committed]
        if not left:
            self._journal.remove()
        for staging in left:
            staging.keep()
            with contextlib.suppress(OutputError):
                self._journal.move_into_staging(staging.folder)
        done = [staging.out for staging in self._stagings.values() if staging.committed]
        hints = [f"already in place: {', '.join(done)}"] if done else []
        if left:
            kept = ", ".join(staging.folder for staging in left)
            command = "--resume without --check puts it in place as it is" if _is_unloadable(error) else RESUME
            hints.append(f"what is done is kept in {kept}: {command}")
        if isinstance(error, ExpoError):
            error.add_hints(*hints)
        elif isinstance(error, KeyboardInterrupt):
            error.args = ("; ".join(filter(None, [str(error), *hints])),)

    def create(self) -> None:
        """Create the shards that do not exist yet, so that all ranks may fill them. Raises OutputError."""
        durable: Counter[str] = Counter()
        for (name, start), (stop, _) in self._done.items():
            durable[name] += stop - start
        for staging in self._stagings.values():
            for shard in self._job.plan.shards:
                create_shard(staging.path(shard.name), shard.size, durable[shard.name])
            with output_errors(staging.folder):  # the journal will name these files, so their names must be durable
                sync_folder(staging.folder)
                sync_folder(staging.parent)

    @property
    def begun(self) -> tuple[int, dict[ChunkKey, int]]:
        """The size of chunks and the chunks that are done, from which the other ranks divide the rest as this one does.

        They do not read the journal for this: this rank may have written more into it by then.
        """
        return self._chunk_bytes, {key: stop for key, (stop, _) in self._done.items()}

    def collect(self) -> None:
        """Take over what the other ranks have done, after all ranks are done. Raises OutputError."""
        written = self.worker.resumed + sum(self.worker.shares.values())
        sound = True
        for done in self._journal.collect(self._chunk_bytes):
            written += sum(stop - start for (_, start), (stop, _) in done.items()) * len(self._job.outs)
            sound = sound and self._add(self.tally, self._chunk_bytes, done)
        if not sound or written != self._job.plan.output_bytes:
            folders = ", ".join(staging.folder for staging in self._stagings.values())
            raise OutputError(f"{folders}: a rank's journal cannot be read, or not all of it")

    def complete(self, card_of: Callable[[int], bytes]) -> None:
        """Add aligned's other files, the model card, the index, and the digests where they are asked for.

        Args:
            card_of: Returns the model card of an output, by its number.

        Raises:
            CheckpointError: A file of aligned cannot be read.
            OutputError: A file cannot be written.
        """
        plan, aligned = self._job.plan, self._job.aligned
        for k, staging in self._stagings.items():
            names = [shard.name for shard in plan.shards]
            if aligned.folder is not None:
                for name in plan.carried:
                    staging.put(name, _parts(aligned.files[name]))
                for name, data in {**plan.rewritten, CARD: card_of(k)}.items():
                    staging.put(name, [data])
                    names.append(name)
                names += plan.carried
            if plan.index is not None:
                staging.put(INDEX, [plan.index])
                names.append(INDEX)
            if self._job.options.digest:
                self._put_digests(staging, names)

    def _put_digests(self, staging: Staging, names: list[str]) -> None:
        """Write SHA256SUMS into an output, or OUT.sha256 beside an output that is one file."""
        if self._job.aligned.folder is not None:
            staging.put(DIGESTS, _digests(staging, [(name, name) for name in sorted(names)]))
        else:
            staging.put_digest(_digests(staging, [(names[0], os.path.basename(staging.out))]))

    def check(self, loader: Any) -> None:
        """Load each output, in its staging folder, with this class of transformers. Raises Unloadable."""
        from .load_check import check_output

        for staging in self._stagings.values():
            check_output(loader, staging.folder, staging.out)

    def commit(self) -> list[str]:
        """Put the outputs in place, one by one, and return warnings. Raises CheckpointError, OutputError."""
        self._job.source.check()
        warnings = []
        for staging in self._stagings.values():
            self._journal.move_beside_output(staging.folder)
            warnings += staging.commit()
        return warnings

    def forget(self) -> list[str]:
        """Remove the journal, after every rank knows that the outputs are in place, and return warnings."""
        return self._journal.remove()


def _is_unloadable(error: BaseException) -> bool:
    """Return True if `--check` failed; it would fail again."""
    from .load_check import Unloadable

    return isinstance(error, Unloadable)


def _parts(path: str) -> Iterator[bytes]:
    """Yield a file of aligned's, one MiB at a time. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            while part := file.read(MIB):
                yield part
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _digests(staging: Staging, names: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """Yield lines as sha256sum writes them, for files that are read back from the disk.

    Args:
        staging: The folder of the files.
        names: (name in the folder, name to write) of each file.
    """
    buffer = page_aligned(CHUNK)
    for staged, name in names:
        path = staging.path(staged)
        digest, at = hashlib.sha256(), 0
        while count := read_back(path, at, buffer):
            digest.update(buffer[:count])
            at += count
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        mark = "\\" if escaped != name else ""  # sha256sum's mark for a name with escapes
        yield os.fsencode(f"{mark}{digest.hexdigest()}  {escaped}\n")
