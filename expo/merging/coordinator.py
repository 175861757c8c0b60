"""The work of rank 0: stage the outputs, complete them after all ranks have computed their parts, and commit them.

After an error the staging folders stay, so that a later merge can resume.
"""

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

RESUME = "repeat the merge with `resume=True` to continue"


class Coordinator:
    """The owner of a merge's staging folders, which stay for `resume` after an error unless their bytes are wrong.

    Attributes:
        worker: The worker of this rank.
        tally: The statistics of the chunks that are done.
    """

    def __init__(self, job: MergeJob, stagings: Mapping[int, Staging], journal: Journal) -> None:
        """Take over the finished chunks of an interrupted merge if `resume` is set, or start with empty folders.

        Args:
            job: The merge.
            stagings: The staging folders of the outputs that are still to be made, by the output's number.
            journal: The journal of all outputs.

        Raises:
            OutputError: A staging folder or the journal cannot be read or written.
        """
        self._job, self._stagings, self._journal = job, stagings, journal
        self._chunk_bytes = job.chunk_bytes
        self._done: DoneChunks = {}
        self.tally = Tally(len(job.outs))
        earlier = journal.resume(job.options.overwrite) if job.options.resume else None
        continues = earlier is not None and self._take_over(earlier.chunk_size, earlier.done)
        for staging in stagings.values():
            with output_errors(staging.folder):
                staging.clear(keep={JOURNAL, *(name for name, _ in self._done)} if continues else ())
        if not continues:
            journal.begin(self._chunk_bytes)
        self.worker = RankWorker(job, journal, self.tally, self._chunk_bytes, self._done)

    def _take_over(self, chunk_bytes: int, done: DoneChunks) -> bool:
        """Take over the finished chunks of an interrupted merge, or return False if they do not fit the plan."""
        tally = Tally(len(self._job.outs))
        if chunk_bytes % PAGE or chunk_bytes > CHUNK or not self._add_statistics(tally, chunk_bytes, done):
            return False
        self._chunk_bytes, self._done, self.tally = chunk_bytes, done, tally
        return True

    def _add_statistics(self, tally: Tally, chunk_bytes: int, done: DoneChunks) -> bool:
        """Add the statistics of these chunks to the tally; return False if one of them is no chunk of the plan."""
        remaining = len(done)
        for chunk in cut(self._job.plan.shards, chunk_bytes):
            if not remaining:
                break
            stop, statistics = done.get((chunk.shard.name, chunk.start), (None, {}))
            if stop is None:
                continue
            if stop != chunk.stop or not tally.add_chunk(chunk, statistics):
                return False
            remaining -= 1
        return remaining == 0

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        cause = self._job.ranks.find_cause(error)
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
        """Record the finished chunks, keep the staging folders, and add hints to the error on how to continue."""
        # The chunks that the journal already has stay valid if the disk fails now or an input has changed.
        with contextlib.suppress(CheckpointError, OutputError):
            self.worker.record()
        uncommitted = [staging for staging in self._stagings.values() if not staging.committed]
        if not uncommitted:
            self._journal.remove()
        for staging in uncommitted:
            staging.keep()
            with contextlib.suppress(OutputError):
                self._journal.move_into_staging(staging.folder)
        committed = [staging.out for staging in self._stagings.values() if staging.committed]
        hints = [f"already in place: {', '.join(committed)}"] if committed else []
        if uncommitted:
            kept = ", ".join(staging.folder for staging in uncommitted)
            how_to_continue = "`resume=True` without `check=True` puts it in place as it is"
            if not _is_unloadable(error):
                how_to_continue = RESUME
            hints.append(f"the finished part is kept in {kept}: {how_to_continue}")
        if isinstance(error, ExpoError):
            error.add_hints(*hints)
        elif isinstance(error, KeyboardInterrupt):
            error.args = ("; ".join(filter(None, [str(error), *hints])),)

    def create(self) -> None:
        """Create the shards that do not exist yet, so that all ranks can write into them. Raises OutputError."""
        durable: Counter[str] = Counter()
        for (name, start), (stop, _) in self._done.items():
            durable[name] += stop - start
        for staging in self._stagings.values():
            for shard in self._job.plan.shards:
                create_shard(staging.path(shard.name), shard.size, durable[shard.name])
            # The journal will name the files, so their directory entries are synced first.
            with output_errors(staging.folder):
                sync_folder(staging.folder)
                sync_folder(staging.parent)

    @property
    def division(self) -> tuple[int, dict[ChunkKey, int]]:
        """The size of a chunk in bytes, and the end in its shard of each chunk that an interrupted merge has done.

        All ranks divide the remaining chunks by these values. The other ranks cannot read them in the journal, because
        this rank may have added chunks to it by then.
        """
        return self._chunk_bytes, {key: stop for key, (stop, _) in self._done.items()}

    def collect(self) -> None:
        """Add the statistics of the other ranks, after all ranks have finished. Raises OutputError."""
        written = self.worker.resumed + sum(self.worker.shares.values())
        valid = True
        for done in self._journal.collect(self._chunk_bytes):
            written += sum(stop - start for (_, start), (stop, _) in done.items()) * len(self._job.outs)
            valid = valid and self._add_statistics(self.tally, self._chunk_bytes, done)
        if not valid or written != self._job.plan.output_bytes:
            folders = ", ".join(staging.folder for staging in self._stagings.values())
            raise OutputError(f"{folders}: a rank's journal cannot be read completely")

    def complete(self, card_of: Callable[[int], bytes]) -> None:
        """Add aligned's other files, the model card and the index to each output, and the digests if `digest` is set.

        Args:
            card_of: Returns the model card of an output, whose number it takes.

        Raises:
            CheckpointError: A file of aligned cannot be read.
            OutputError: A file cannot be written.
        """
        plan, aligned = self._job.plan, self._job.aligned
        for k, staging in self._stagings.items():
            names = [shard.name for shard in plan.shards]
            if aligned.folder is not None:
                for name in plan.carried:
                    staging.put(name, _read_in_parts(aligned.files[name]))
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
            staging.put(DIGESTS, _digest_lines(staging, [(name, name) for name in sorted(names)]))
        else:
            staging.put_digest(_digest_lines(staging, [(names[0], os.path.basename(staging.out))]))

    def check(self, loader: Any) -> None:
        """Load each output from its staging folder with this class of transformers. Raises Unloadable."""
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

    def remove_journal(self) -> list[str]:
        """Remove the journal after every rank has learnt that the outputs are in place, and return warnings."""
        return self._journal.remove()


def _is_unloadable(error: BaseException) -> bool:
    """Return True if the check of `check=True` failed: a merge that resumes with the check would fail again."""
    from .load_check import Unloadable

    return isinstance(error, Unloadable)


def _read_in_parts(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file of aligned, one MiB at a time. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            while part := file.read(MIB):
                yield part
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _digest_lines(staging: Staging, names: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """Yield a line for each file in the format of sha256sum, with the digest of the bytes on the disk.

    Args:
        staging: The folder of the files.
        names: (name in the folder, name to write into the line) of each file.
    """
    buffer = page_aligned(CHUNK)
    for staged, name in names:
        path = staging.path(staged)
        digest, position = hashlib.sha256(), 0
        while count := read_back(path, position, buffer):
            digest.update(buffer[:count])
            position += count
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        mark = "\\" if escaped != name else ""  # sha256sum marks a line with an escaped name so
        yield os.fsencode(f"{mark}{digest.hexdigest()}  {escaped}\n")
