"""The journal in a staging folder: which chunks of an interrupted merge are on the disk, so that --resume can continue.

The first line names the merge that the journal belongs to. Every few seconds the merge syncs what it has written and
appends a line that lists these chunks with their statistics. Each line begins with its own checksum: a line that a
crash cut short, or that is damaged, does not count, nor does any line after it. When several ranks make a merge, rank 0
writes this journal, and every other rank writes one of its own beside it, `.expo-journal.RANK`, until rank 0 collects
the lines of all.

While an output is put in place, its journal is beside it as `.NAME.expo-journal`: a journal beside an output proves
that the output is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import OutputError
from ..kernels.contract import Statistics
from ..planning.shards import Chunk, ChunkStatistics
from .os_errors import output_errors
from .staging import JOURNAL, journals_of_ranks, lock

INTERVAL = 2.0  # seconds of work that a crash can cost; a sync after direct writes takes milliseconds
JOIN_TIMEOUT = 40.0  # seconds; a client of NFS may show other hosts' files up to 30 seconds late
MAX_JOURNAL_SIZE = 1 << 30  # bytes; the journal of a terabyte of output takes a tenth of this

ChunkKey = tuple[str, int]  # the name of the chunk's shard, and the offset of the chunk's first byte in it
DoneChunks = dict[ChunkKey, tuple[int, ChunkStatistics]]  # the offset after the chunk's last byte, and its statistics


class JournalContents(NamedTuple):
    """A journal's lines.

    Attributes:
        merge: The merge that the journal belongs to, as JSON.
        chunk_size: The size of the merge's chunks, in bytes.
        done: The chunks that are on the disk.
    """

    merge: Any
    chunk_size: int
    done: DoneChunks


class DamagedJournal(Exception):
    """An error for a journal's line that does not have the form in which this program writes lines."""


def encode(record: Any) -> bytes:
    """Return the line for a JSON value: the value's checksum, and the value."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> Iterator[Any]:
    """Yield the values of the lines, up to the first damaged line."""
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
            return
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            return


def chunks_to_json(done: DoneChunks) -> list[Any]:
    """Return chunks as a JSON value."""
    return [
        [name, start, stop, [[i, *statistics[:3], statistics.counts] for i, statistics in measured.items()]]
        for (name, start), (stop, measured) in done.items()
    ]


def chunks_from_json(value: Any) -> DoneChunks:
    """Return the chunks that `chunks_to_json` made into a JSON value. Raises DamagedJournal."""
    try:
        return {
            (_require(str, name), _require(int, start)): (
                _require(int, stop),
                {_require(int, i): _statistics_from_json(statistics) for i, *statistics in measured},
            )
            for name, start, stop, measured in value
        }
    except (TypeError, ValueError) as error:
        raise DamagedJournal(str(error)) from error


def _statistics_from_json(values: Sequence[Any]) -> Statistics:
    d_squared, aligned_squared, max_abs_d, counts = values
    pairs = tuple((_require(int, changed), _require(int, non_finite)) for changed, non_finite in counts)
    sums = (_require(float, d_squared), _require(float, aligned_squared))
    return Statistics(*sums, _require(float, max_abs_d), pairs)


def _require(kind: type[Any], value: Any) -> Any:
    """Return a value of exactly this type. Raises ValueError for another type, and for True where an int belongs."""
    if type(value) is not kind:
        raise ValueError(f"{value!r} where {kind.__name__} is expected")
    return value


class Journal:
    """One rank's journals: one for each output of the merge, all with the same lines. Only one thread may use it."""

    def __init__(self, folders: Sequence[str], merge: Mapping[str, Any], rank: int = 0) -> None:
        """Describe the journals, without touching the disk. Rank 0 calls `begin` or `resume` next, others call `join`.

        Args:
            folders: The staging folders of all outputs.
            merge: The identity of the merge, as a JSON object: a merge can continue only a merge of the same identity.
            rank: The number of this rank.
        """
        self._folders = folders
        self._merge = json.loads(json.dumps(merge))
        self._rank = rank
        self._locked_files: list[int] = []  # descriptors of the journals of a rank other than 0
        self._pending: DoneChunks = {}
        self._flushed = time.monotonic()

    def begin(self, chunk_size: int) -> None:
        """Write journals without chunks, in place of any older ones. Raises OutputError."""
        for folder in self._folders:
            for path in (os.path.join(folder, JOURNAL), path_beside_output(folder)):
                with output_errors(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        self._append({"merge": self._merge, "chunk": chunk_size})

    def resume(self, overwrite: bool = False) -> JournalContents | None:
        """Read what an interrupted merge has done, and make its journals ready for further lines.

        Args:
            overwrite: Return None for the journal of another merge instead of raising.

        Returns:
            The chunks that are on the disk for all outputs; None if the merge has to start from the beginning.

        Raises:
            OutputError: A journal belongs to another merge, and the message names the differences; or a journal cannot
                be read.
        """
        for folder in self._folders:
            self.move_into_staging(folder)
        found = [read_journal(journal_path(folder), repair=True) for folder in self._folders]
        for contents, folder in zip(found, self._folders, strict=True):
            if contents is not None and contents.merge != self._merge:
                if overwrite:
                    return None
                differing = "; ".join(differences(contents.merge, self._merge))
                raise OutputError(
                    f"{folder} holds another merge ({differing}): choose another `out`, or `overwrite=True` starts anew"
                )
        common = _common_contents(found)
        if common is not None:
            for done in self.collect(common.chunk_size):
                common.done.update(done)
        return common

    def collect(self, chunk_size: int) -> Iterator[DoneChunks]:
        """Take over the chunks in the journals of other ranks, one rank at a time, and remove these journals.

        A rank's journal that is damaged, or that belongs to another merge or another chunk size, does not count.

        Args:
            chunk_size: The size of this merge's chunks, in bytes.

        Yields:
            One rank's chunks, after they were written to rank 0's journals.

        Raises:
            OutputError: A journal cannot be read, written or removed.
        """
        staged = [folder for folder in self._folders if os.path.isdir(folder)]
        for name in sorted({name for folder in staged for name in journals_of_ranks(folder)}):
            paths = [os.path.join(folder, name) for folder in staged]
            found = [read_journal(path) for path in paths]
            if all(each and each.merge == self._merge and each.chunk_size == chunk_size for each in found):
                common = _common_contents(found)
                if common is not None and common.done:
                    self._append({"done": chunks_to_json(common.done)})
                    yield common.done
            for path in paths:
                with output_errors(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def join(self, chunk_size: int) -> None:
        """Create and lock the journals of a rank other than 0, once rank 0's exist. Raises OutputError."""
        self._wait_for_rank_0()
        for folder in filter(os.path.isdir, self._folders):
            path = os.path.join(folder, f"{JOURNAL}.{self._rank}")
            with output_errors(path):
                self._locked_files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
                lock(self._locked_files[-1])
        # Another merge may have emptied the staging folder before the lock was taken, so the check is repeated.
        self._wait_for_rank_0()
        self._append({"merge": self._merge, "chunk": chunk_size})

    def _wait_for_rank_0(self) -> None:
        """Wait until rank 0's journals of this merge are visible: another host's files may appear some seconds late."""
        deadline = time.monotonic() + JOIN_TIMEOUT
        while True:
            for folder in self._folders:
                with output_errors(folder):
                    os.listdir(os.path.dirname(folder))  # makes the client of a network filesystem ask the server
            found = [read_journal(journal_path(folder)) for folder in self._folders]
            if all(each is not None and each.merge == self._merge for each in found):
                return
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{journal_path(self._folders[0])}: rank {self._rank} cannot read rank 0's journal of this merge"
                )
            time.sleep(0.1)

    def invalidate(self) -> None:
        """Remove this rank's journals, so that no chunk counts, because the disk does not return the bytes written."""
        for folder in filter(os.path.isdir, self._folders):
            for name in (JOURNAL, f"{JOURNAL}.{self._rank}"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))

    def close(self) -> None:
        """Close and unlock the journals of a rank other than 0."""
        while self._locked_files:
            os.close(self._locked_files.pop())

    def add(self, chunk: Chunk, measured: ChunkStatistics) -> None:
        """Remember a chunk that was written for all outputs; `flush` syncs it and writes it to the journals."""
        self._pending[chunk.shard.name, chunk.start] = chunk.stop, measured

    @property
    def due(self) -> bool:
        """True if there are chunks to write down and the last flush is INTERVAL seconds ago."""
        return bool(self._pending) and time.monotonic() - self._flushed >= INTERVAL

    def flush(self, sync: Callable[[set[str]], None]) -> None:
        """Sync the shards of all added chunks, then write these chunks to the journals.

        Args:
            sync: Makes the shards with these names durable.

        Raises:
            OutputError: A journal cannot be written, or `sync` raised it.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        sync({name for name, _ in pending})
        self._append({"done": chunks_to_json(pending)})
        self._flushed = time.monotonic()

    def move_beside_output(self, folder: str) -> None:
        """Move the journal out of a staging folder that is about to become an output. Raises OutputError.

        If the process is killed after the output is in place, the journal beside it proves that the output is complete.
        """
        with output_errors(folder):
            os.rename(os.path.join(folder, JOURNAL), path_beside_output(folder))

    def move_into_staging(self, folder: str) -> None:
        """Undo `move_beside_output` if the staging folder has not become an output. Raises OutputError."""
        if os.path.isdir(folder) and os.path.lexists(path_beside_output(folder)):
            with output_errors(folder):
                os.rename(path_beside_output(folder), os.path.join(folder, JOURNAL))

    def remove(self) -> list[str]:
        """Remove the journals beside the outputs, once all outputs are in place; return warnings."""
        warnings = []
        for path in map(path_beside_output, self._folders):
            try:
                os.unlink(path)
            except OSError as error:
                warnings.append(f"{path} is not needed any more, but could not be removed: {error.strerror}")
        return warnings

    def _append(self, record: Any) -> None:
        """Append a line to this rank's journals and sync it."""
        for path in self._paths():
            with output_errors(path), open(path, "ab") as file:
                file.write(encode(record))
                file.flush()
                os.fsync(file.fileno())

    def _paths(self) -> Iterator[str]:
        """Yield the paths of this rank's journals: those of rank 0 include outputs that are in place already."""
        if self._rank == 0:
            yield from map(journal_path, self._folders)
        else:
            yield from (os.path.join(each, f"{JOURNAL}.{self._rank}") for each in self._folders if os.path.isdir(each))


def path_beside_output(folder: str) -> str:
    """Return the path that a staging folder's journal has once the output is put in place: `.NAME.expo-journal`."""
    return f"{folder.removesuffix('-staging')}-journal"


def journal_path(folder: str) -> str:
    """Return the path of rank 0's journal: in the staging folder if the folder exists, else beside the output."""
    return os.path.join(folder, JOURNAL) if os.path.isdir(folder) else path_beside_output(folder)


def has_journal(folder: str) -> bool:
    """Return True if rank 0's journal exists, in the staging folder or beside the output."""
    return os.path.lexists(journal_path(folder))


def differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each difference between the identities of two merges.

    Args:
        before: The other merge's identity, as its journal or its rank gives it.
        now: This merge's identity.
    """
    if not isinstance(before, dict):
        return ["its journal is damaged"]
    return [
        _file_difference(name, before.get(name), value) if name in ("sft", "aligned", "the files to write")
        else f"{name} was {json.dumps(before.get(name))}, is {json.dumps(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ] or ["another version of expo has made it"]  # fmt: skip


def _file_difference(name: str, before: Any, now: Mapping[str, Any]) -> str:
    """Return a sentence that names the first file that differs, and counts the others."""
    before = before if isinstance(before, dict) else {}
    others = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{name}: another size, time of change or header of {others[0] if others else 'its files'}{more}"


def _common_contents(found: Sequence[JournalContents | None]) -> JournalContents | None:
    """Return the chunks that all outputs' journals have; None if a journal is missing."""
    present = [each for each in found if each is not None]
    if not present or len(present) < len(found):
        return None
    first, *others = present
    done = {key: value for key, value in first.done.items() if all(key in each.done for each in others)}
    return first._replace(done=done)


def read_journal(path: str, repair: bool = False) -> JournalContents | None:
    """Read a journal, up to its first damaged line.

    Args:
        path: The journal's path.
        repair: Cut off everything after the last good line, so that further lines can follow it.

    Returns:
        The journal's contents; None if the journal is absent, has no good first line, or is not this program's.

    Raises:
        OutputError: The system refuses to read or to write the file.
    """
    try:
        with open(path, "r+b" if repair else "rb", opener=_open_no_link) as file:
            if os.fstat(file.fileno()).st_size > MAX_JOURNAL_SIZE:
                return None
            lines = list(decode(file.read()))
            if repair:
                file.truncate(sum(len(encode(line)) for line in lines))
        head, *records = lines
        done: DoneChunks = {}
        for record in records:
            done.update(chunks_from_json(record.get("done", [])))
        chunk_size = _require(int, head["chunk"])
        return JournalContents(head["merge"], chunk_size, done) if chunk_size > 0 else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    except (DamagedJournal, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open_no_link(path: str, flags: int) -> int:
    """Open a file for `open()`, without following a link and without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
