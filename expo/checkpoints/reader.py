"""An input file's bytes while others may change it: mapped where that is safe, read with pread elsewhere.

A mapping was 1.2 to 1.3 times as fast as pread from the page cache, but a file that shrinks under one ends the process
with SIGBUS, and no check of its size before can rule that out. A read lease can: while it is held the system makes
whoever wants to write to the file, or to truncate it, wait (45 seconds at most) and lets the holder know. So a file is
mapped where its filesystem is a local one and grants a lease (which it does to the owner of a file that nobody has open
for writing), and given back at the first sign of a writer; all others, those on network filesystems among them, are
read with pread, which a file that shrinks cannot harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, NamedTuple, Protocol

from ..errors import CheckpointError

# Filesystems on which nothing shrinks a file but through this kernel, which knows of the lease.
LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"}

# Bytes that a page fault can map at once: a large folio. Pages of neighbours who have been let go come back with it
# and have to go again, or some 16 MB for each GB of a model stay; at 4 KiB to 2 MiB a merge was equally fast.
AROUND = 1 << 21


class Identity(NamedTuple):
    """What stays the same as long as nobody writes to a file or puts another in its place."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, fd: int) -> Identity:
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class ByteReader(Protocol):
    """What a tensor is read from, as if it lay in one piece."""

    def read(self, start: int, into: Any) -> None: ...

    def mapped(self, start: int, stop: int) -> AbstractContextManager[memoryview | None]: ...

    def ahead(self, start: int, stop: int) -> None: ...


@contextlib.contextmanager
def open_regular_file(path: str) -> Iterator[BinaryIO]:
    """A regular file, open. Raises OSError, and CheckpointError for a FIFO, which would wait for a writer."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield file


class FileReader:
    """One file, opened when its bytes are first asked for; safe for any number of threads."""

    def __init__(self, path: str, identity: Identity) -> None:
        """identity: the file's when its header was read."""
        self.path = path
        self.identity = identity
        self._lock = threading.Lock()
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._users = 0  # of the mapping, at this moment
        self._wanted = False  # by somebody who writes

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the file's bytes from `start` on. Raises CheckpointError."""
        fd, memory = self._open(), memoryview(into).cast("B")
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(fd, [memory[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {error.strerror} at byte {start + done}") from error
            if not count:
                raise CheckpointError(f"{self.path}: it ends at byte {start + done} now, {self._was()}")
            done += count

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Bytes [start, stop) as they are mapped, or None where only `read` will do; the pages are let go then."""
        self._open()
        with self._lock:
            mapping = self._usable()
            self._users += mapping is not None
        if mapping is None:
            yield None
            return
        try:
            view = memoryview(mapping)[start:stop]
            yield view
            view.release()
            if start < stop:
                first, last = start // AROUND * AROUND, min(-(-stop // AROUND) * AROUND, len(mapping))
                with contextlib.suppress(OSError):
                    mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
        finally:
            with self._lock:
                self._users -= 1
            self.give_way()

    def ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading bytes [start, stop) from the disk."""
        if hasattr(os, "posix_fadvise") and start < stop:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._open(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def give_way(self) -> None:
        """Unmap the file and end the lease if somebody waits to write to it; call it now and then."""
        with self._lock:
            self._usable()

    def _usable(self) -> mmap.mmap | None:
        """The mapping, unless somebody waits for it to go: then it goes as soon as nobody uses it."""
        if self._map is None:
            return None
        self._wanted = self._wanted or fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        if self._wanted and not self._users:
            self._unmap()
        return None if self._wanted else self._map

    def check(self) -> None:
        """Raise CheckpointError if the file is not what it was when its header was read."""
        if self._fd >= 0 and Identity.of(self._fd) != self.identity:
            raise CheckpointError(f"{self.path}: it was changed while it was read, {self._was()}")

    def close(self) -> None:
        """Unmap and close; a no-op when nothing is open."""
        with self._lock:
            if self._map is not None:
                self._unmap()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _was(self) -> str:
        return (
            f"but was {self.identity.size} bytes long and untouched when its header was read: let it be, and try again"
        )

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                try:  # O_NONBLOCK: a FIFO in the file's place would wait for a writer
                    fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    raise CheckpointError(f"{self.path}: {error.strerror}") from error
                found = Identity.of(fd)
                if found != self.identity:
                    os.close(fd)
                    raise CheckpointError(f"{self.path}: {found.size} bytes now; it is being changed, {self._was()}")
                self._fd = fd
                self._map = self._guarded(fd)
            return self._fd

    def _guarded(self, fd: int) -> mmap.mmap | None:
        """A mapping that a lease guards, or None."""
        if not hasattr(fcntl, "F_SETLEASE") or filesystem(self.identity.device) not in LOCAL:
            return None
        try:
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; SIGIO would end the process
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:  # somebody else's file, or one that is open for writing
            return None
        try:
            if os.fstat(fd).st_size != self.identity.size:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except OSError:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return None

    def _unmap(self) -> None:
        assert self._map is not None
        with contextlib.suppress(BufferError):  # held by the traceback of an error, which must not be hidden
            self._map.close()
        self._map = None
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def filesystem(device: int) -> str:
    """The type of the filesystem with this device number, "" where the system does not say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields = line.split()
                if fields[2] == number:
                    return fields[fields.index("-") + 1]
    except OSError:
        pass
    return ""
