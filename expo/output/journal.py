"""What of an interrupted merge is on the disk: a journal in the staging folder, from which --resume goes on.

A line for the merge that it belongs to, then one for every few seconds: the chunks that were written and synced before
the line was, with their statistics. Each line carries its own checksum, so a line that a crash cut short counts as not
written, and with it all that follows. Where several ranks make a merge, rank 0 has the journal and each other one has a
journal of its own beside it, `.expo-journal.RANK`, until rank 0 collects its lines.
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
from ..execution.lanes import Measured
from ..kernels.contract import Statistics
from ..planning.shards import Chunk
from .staging import JOURNAL, journals_of_ranks, lock, output_errors

LATE = 40.0  # seconds; a client of NFS may hold on to what it knows of a folder for 30
INTERVAL = 2.0  # seconds of work that a crash can cost; a sync of what was written past the cache takes milliseconds
MOST = 1 << 30  # bytes of a journal; a terabyte of output takes a tenth of it

Key = tuple[str, int]  # a chunk: its shard's name and the first of its bytes
Done = dict[Key, tuple[int, Measured]]  # to the byte after its last, and its statistics


def encode(record: Any) -> bytes:
    """A line: the checksum of a JSON value, and the value."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> Iterator[Any]:
    """The values of the lines, up to the first that is damaged."""
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
            return
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            return


def described(done: Done) -> list[Any]:
    """Chunks as JSON has them."""
    return [
        [name, start, stop, [[i, *moved[:3], moved.counts] for i, moved in measured.items()]]
        for (name, start), (stop, measured) in done.items()
    ]


class Damaged(Exception):
    """A journal that this program has not written."""


def understand(record: Any) -> Done:
    """The chunks of a line. Raises Damaged."""
    try:
        return {
            (_kind(str, name), _kind(int, start)): (
                _kind(int, stop),
                {_kind(int, i): _statistics(m) for i, *m in moved},
            )
            for name, start, stop, moved in record
        }
    except (TypeError, ValueError) as error:
        raise Damaged(str(error)) from error


def _statistics(values: Sequence[Any]) -> Statistics:
    d, a, top, counts = values
    pairs = tuple((_kind(int, changed), _kind(int, wild)) for changed, wild in counts)
    return Statistics(_kind(float, d), _kind(float, a), _kind(float, top), pairs)


def _kind(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} where {kind.__name__} is expected")
    return value


class Journal:
    """The journals of a merge's outputs, all with the same lines; for one thread."""

    def __init__(self, folders: Sequence[str], merge: Mapping[str, Any], rank: int = 0) -> None:
        """folders: the stagings of all outputs. merge: what the merge is, as JSON.

        `begin` or `resume` comes next on rank 0, `join` on others.
        """
        self._folders = folders
        self._merge = json.loads(json.dumps(merge))
        self._rank = rank
        self._held: list[int] = []  # descriptors of a rank's own journals, locked while it writes
        self._pending: Done = {}
        self._flushed = time.monotonic()

    def begin(self, chunk_size: int) -> None:
        """A journal without chunks. Raises OutputError."""
        for folder in self._folders:
            for path in (os.path.join(folder, JOURNAL), aside(folder)):
                with output_errors(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        self._append({"merge": self._merge, "chunk": chunk_size})

    def resume(self, overwrite: bool = False) -> tuple[int, Done] | None:
        """(chunk size, what is on the disk for all outputs); None where that is nothing that could be gone on with.

        Raises OutputError where the journal is another merge's, and says what differs; overwrite: that is nothing then.
        """
        for folder in self._folders:
            self.put_back(folder)
        found = [read(place(folder), mend=True) for folder in self._folders]
        for each, folder in zip(found, self._folders, strict=True):
            if each is not None and each.merge != self._merge:
                if overwrite:
                    return None
                differing = "; ".join(differences(each.merge, self._merge))
                raise OutputError(
                    f"{folder} holds another merge ({differing}): choose another --out, or --overwrite starts anew"
                )
        begun = _of_all(found)
        if begun is not None:
            for done in self.collect(begun[0]):
                begun[1].update(done)
        return begun

    def collect(self, chunk_size: int) -> Iterator[Done]:
        """Take over the chunks that other ranks wrote down, a rank's at a time, and remove its journal.

        Raises OutputError.
        """
        staged = [folder for folder in self._folders if os.path.isdir(folder)]
        for name in sorted({name for folder in staged for name in journals_of_ranks(folder)}):
            paths = [os.path.join(folder, name) for folder in staged]
            found = [read(path) for path in paths]
            if all(each is not None and each.merge == self._merge and each.chunk == chunk_size for each in found):
                begun = _of_all(found)
                if begun is not None and begun[1]:
                    self._append({"done": described(begun[1])})
                    yield begun[1]
            for path in paths:
                with output_errors(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def join(self, chunk_size: int) -> None:
        """Begin a rank's own journal beside that of rank 0. Raises OutputError."""
        self._await()
        for folder in filter(os.path.isdir, self._folders):
            path = os.path.join(folder, f"{JOURNAL}.{self._rank}")
            with output_errors(path):
                self._held.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
                lock(self._held[-1])
        # Looked at again under the lock, which keeps others from beginning anew: until here they might have.
        self._await()
        self._append({"merge": self._merge, "chunk": chunk_size})

    def _await(self) -> None:
        """Until rank 0's journal of this merge is there: what another host has just made may be some seconds late."""
        deadline = time.monotonic() + LATE
        while True:
            for folder in self._folders:
                with output_errors(folder):
                    os.listdir(os.path.dirname(folder))  # has a network filesystem ask for them again
            found = [read(place(folder)) for folder in self._folders]
            if all(each is not None and each.merge == self._merge for each in found):
                return
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{place(self._folders[0])}: rank {self._rank} cannot read rank 0's journal of this merge"
                )
            time.sleep(0.1)

    def void(self) -> None:
        """Have nothing count that was written down: what is on the disk is not what was written."""
        for folder in filter(os.path.isdir, self._folders):
            for name in (JOURNAL, f"{JOURNAL}.{self._rank}"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))

    def close(self) -> None:
        """Let go of a rank's own journals."""
        while self._held:
            os.close(self._held.pop())

    def add(self, chunk: Chunk, measured: Measured) -> None:
        """A chunk that was written for all outputs, though not synced yet."""
        self._pending[chunk.shard.name, chunk.start] = chunk.stop, measured

    @property
    def due(self) -> bool:
        return bool(self._pending) and time.monotonic() - self._flushed >= INTERVAL

    def flush(self, sync: Callable[[set[str]], None]) -> None:
        """Have the shards of the pending chunks synced, then write down that they are. Raises OutputError."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        sync({name for name, _ in pending})
        self._append({"done": described(pending)})
        self._flushed = time.monotonic()

    def set_aside(self, folder: str) -> None:
        """Move the journal out of a staging folder that is about to become an output. Raises OutputError.

        Where a kill comes in between, the journal beside an output is what says that it is complete.
        """
        with output_errors(folder):
            os.rename(os.path.join(folder, JOURNAL), aside(folder))

    def put_back(self, folder: str) -> None:
        """Undo `set_aside` where the folder has not become an output. Raises OutputError."""
        if os.path.isdir(folder) and os.path.lexists(aside(folder)):
            with output_errors(folder):
                os.rename(aside(folder), os.path.join(folder, JOURNAL))

    def remove(self) -> list[str]:
        """Once all outputs are in place; returns warnings."""
        warnings = []
        for folder in self._folders:
            try:
                os.unlink(aside(folder))
            except OSError as error:
                warnings.append(f"{aside(folder)} is of no use any more, but could not be removed: {error.strerror}")
        return warnings

    def _append(self, record: Any) -> None:
        for path in self._paths():
            with output_errors(path), open(path, "ab") as file:
                file.write(encode(record))
                file.flush()
                os.fsync(file.fileno())

    def _paths(self) -> Iterator[str]:
        """Where this rank writes: rank 0 for every output, others for those that are not in place."""
        if self._rank == 0:
            yield from map(place, self._folders)
        else:
            yield from (os.path.join(each, f"{JOURNAL}.{self._rank}") for each in self._folders if os.path.isdir(each))


def aside(folder: str) -> str:
    """Where a staging folder's journal is while the folder is put in place: `.NAME.expo-journal`."""
    return f"{folder.removesuffix('-staging')}-journal"


def place(folder: str) -> str:
    """Where a staging folder's journal is now."""
    return os.path.join(folder, JOURNAL) if os.path.isdir(folder) else aside(folder)


def differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """In what two merges differ, in words."""
    if not isinstance(before, dict):
        return ["its journal is damaged"]
    return [
        _files(name, before.get(name), value) if name in ("sft", "aligned", "the files to write")
        else f"{name} was {json.dumps(before.get(name))}, is {json.dumps(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ] or ["it is of another version"]  # fmt: skip


def _files(name: str, before: Any, now: Mapping[str, Any]) -> str:
    """Which files of an input are others now."""
    before = before if isinstance(before, dict) else {}
    others = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{name}: another size, time of change or header of {others[0] if others else 'its files'}{more}"


def has_journal(folder: str) -> bool:
    """Whether a staging folder's journal is there, in it or beside it."""
    return os.path.lexists(place(folder))


class Found(NamedTuple):
    """A journal's lines: the merge, the size of its chunks, and those that are durable."""

    merge: Any
    chunk: int
    done: Done


def _of_all(found: Sequence[Found | None]) -> tuple[int, Done] | None:
    """Of the journals of all outputs: the size of the chunks, and those that every one has; None if one is missing."""
    there = [each for each in found if each is not None]
    if not there or len(there) < len(found):
        return None
    first, *others = there
    return first.chunk, {key: value for key, value in first.done.items() if all(key in each.done for each in others)}


def read(path: str, mend: bool = False) -> Found | None:
    """A journal; None for one that is absent, damaged, or without a whole first line.

    mend: cut off what follows the last good line, so that new ones can follow it. Raises OutputError.
    """
    try:
        with open(path, "r+b" if mend else "rb", opener=_no_link) as file:
            if os.fstat(file.fileno()).st_size > MOST:
                return None
            lines = list(decode(file.read()))
            if mend:
                file.truncate(sum(len(encode(line)) for line in lines))
        head, *records = lines
        done: Done = {}
        for record in records:
            done.update(understand(record.get("done", [])))
        chunk = _kind(int, head["chunk"])
        return Found(head["merge"], chunk, done) if chunk > 0 else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    except (Damaged, ValueError, KeyError, TypeError, AttributeError):
        return None


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
