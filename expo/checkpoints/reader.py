"""Reading the bytes of an input file that other processes may change: mapped where that is safe, else with pread.

A mapping was 1.2 to 1.3 times as fast as pread from the page cache. But a file that gets shorter while it is mapped
ends the process with SIGBUS, and no earlier check of its size can prevent that. A read lease prevents it: while this
process has a read lease on a file, a process that opens the file for writing, or truncates it, has to wait (at most 45
seconds), and the system tells this process of the request. So a file is mapped if its filesystem is local and grants a
lease. It does so to the owner of a file that no process has open for writing. This process ends the lease at the first
request. All other files, such as those on network filesystems, are read with pread, which a shorter file cannot harm.
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

# A file on these filesystems gets shorter only through this machine's kernel, which knows of the lease.
LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"}

# One page fault can map a large folio, of up to this many bytes, and so map pages again that were released before. The
# pages are therefore released in whole folios; without this, about 16 MB stay in memory for each GB of a model. A merge
# took the same time with every size from 4 KiB to 2 MiB.
FOLIO = 1 << 21  # bytes


class Identity(NamedTuple):
    """A file's numbers that stay the same as long as no process writes to it or puts another file in its place.

    Attributes:
        device: The number of the device.
        inode: The number of the file on the device.
        size: The size in bytes.
        modified: The time of the last change, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, fd: int) -> Identity:
        """Return the identity of an open file, by its descriptor."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class ByteReader(Protocol):
    """A reader of bytes that are numbered as if they were contiguous: those of a file, or those of one tensor.

    Attributes:
        scattered: True if the bytes are spread over a file, so that few of them take as long to read as many.
    """

    scattered: bool

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the bytes from `start` on. Raises CheckpointError."""

    def mapped(self, start: int, stop: int) -> AbstractContextManager[memoryview | None]:
        """Give bytes [start, stop) in mapped memory, or None if only `read` can give them."""

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading bytes [start, stop) from the disk."""


@contextlib.contextmanager
def open_regular_file(path: str) -> Iterator[BinaryIO]:
    """Open a regular file. Raises OSError, and CheckpointError for another kind: a FIFO would wait for a writer."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield file


class FileReader:
    """A reader of one file, which it opens at the first read. Any number of threads may use it."""

    scattered = False

    def __init__(self, path: str, identity: Identity) -> None:
        """Set the path, and the identity that the file had when its header was read."""
        self.path = path
        self.identity = identity
        self._lock = threading.Lock()
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._users = 0  # callers that use the mapping at this moment
        self._lease_broken = False  # a writer waits for the end of the lease

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
                raise CheckpointError(f"{self.path}: it ends at byte {start + done} now, {self._as_it_was()}")
            done += count

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """Give bytes [start, stop) in mapped memory, and release their pages afterwards; None if only `read` works."""
        self._open()
        with self._lock:
            mapping = self._usable_mapping()
            self._users += mapping is not None
        if mapping is None:
            yield None
            return
        try:
            view = memoryview(mapping)[start:stop]
            yield view
            view.release()
            if start < stop:
                first, last = start // FOLIO * FOLIO, min(-(-stop // FOLIO) * FOLIO, len(mapping))
                with contextlib.suppress(OSError):
                    mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
        finally:
            with self._lock:
                self._users -= 1
            self.answer_lease_break()

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to start reading bytes [start, stop) from the disk."""
        if hasattr(os, "posix_fadvise") and start < stop:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._open(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def answer_lease_break(self) -> None:
        """Unmap the file and end the lease if a process waits to write to the file. Callers call this regularly."""
        with self._lock:
            self._usable_mapping()

    def _usable_mapping(self) -> mmap.mmap | None:
        """Return the mapping, or None if a writer waits; then unmap the file as soon as no caller uses it."""
        if self._map is None:
            return None
        self._lease_broken = self._lease_broken or fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        if self._lease_broken and not self._users:
            self._unmap()
        return None if self._lease_broken else self._map

    def check(self) -> None:
        """Raise CheckpointError if the file has changed since its header was read."""
        if self._fd >= 0 and Identity.of(self._fd) != self.identity:
            raise CheckpointError(f"{self.path}: it was changed while it was read, {self._as_it_was()}")

    def close(self) -> None:
        """Unmap and close the file, if it is open."""
        with self._lock:
            if self._map is not None:
                self._unmap()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _as_it_was(self) -> str:
        """Return the end of a message about a file that has changed."""
        size = self.identity.size
        return f"and had {size} bytes when its header was read: let no process change the file, and try again"

    def _open(self) -> int:
        """Return the file's descriptor, and open the file at the first call. Raises CheckpointError."""
        with self._lock:
            if self._fd < 0:
                try:  # without O_NONBLOCK, a FIFO in the file's place would wait for a writer
                    fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    raise CheckpointError(f"{self.path}: {error.strerror}") from error
                found = Identity.of(fd)
                if found != self.identity:
                    os.close(fd)
                    raise CheckpointError(
                        f"{self.path}: {found.size} bytes now; it is being changed, {self._as_it_was()}"
                    )
                self._fd = fd
                self._map = self._map_with_lease(fd)
            return self._fd

    def _map_with_lease(self, fd: int) -> mmap.mmap | None:
        """Take a read lease and return a mapping of the file; None if the filesystem grants no lease."""
        if not hasattr(fcntl, "F_SETLEASE") or filesystem_type(self.identity.device) not in LOCAL:
            return None
        try:
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; SIGIO would end the process
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:  # another user's file, or one that is open for writing
            return None
        try:
            if os.fstat(fd).st_size != self.identity.size:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except OSError:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return None

    def _unmap(self) -> None:
        """Unmap the file and end the lease."""
        assert self._map is not None
        with contextlib.suppress(BufferError):  # an error's traceback still has a view, and the error must be seen
            self._map.close()
        self._map = None
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def filesystem_type(device: int) -> str:
    """Return the type of the filesystem with this device number; "" if the system does not say."""
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
