"""Writes and reads past the page cache: with O_DIRECT where the filesystem supports it, buffered where it does not."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading

from ..errors import OutputError
from ..memory import PAGE
from .os_errors import output_errors

O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 on a system without it


def create_shard(path: str, size: int, durable: int = 0) -> None:
    """Create a shard's file with its full size and its blocks, or prepare the file that an interrupted merge has left.

    The whole file is allocated before the first write: a full disk shows early, and writes into allocated blocks run
    in parallel.

    Args:
        path: The file's path.
        size: The file's final size in bytes.
        durable: How many of these bytes an interrupted merge has written and synced; 0 for a new file.

    Raises:
        OutputError: A new file's name is taken, the file of an interrupted merge is too short, or the system refuses.
    """
    with output_errors(path):
        flags = 0 if durable else os.O_CREAT | os.O_EXCL
        fd = os.open(path, flags | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
        try:
            if durable and os.fstat(fd).st_size < size:
                raise OutputError(f"{path} is shorter than the interrupted merge left it: `overwrite=True` starts anew")
            allocate(fd, size)
            if durable == size:
                # ShardWriter wrote the last block whole, and the merge may have ended before the excess was cut off.
                os.ftruncate(fd, size)
                os.fsync(fd)
        finally:
            os.close(fd)


def allocate(fd: int, size: int) -> None:
    """Give an open file its size in bytes and, if the filesystem can allocate them at once, its blocks."""
    # os.posix_fallocate is no substitute: where the filesystem cannot allocate, glibc writes into every block instead.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


class ShardWriter:
    """One shard's file, which any number of threads write in chunks; the last chunk syncs and closes the file.

    Attributes:
        path: The file's path.
        size: The file's final size in bytes.
        direct: True as long as all writes go past the page cache.
    """

    def __init__(self, path: str, size: int, missing: int) -> None:
        """Prepare to write into a file that exists.

        Args:
            path: The file's path.
            size: The file's final size in bytes.
            missing: How many of these bytes this writer will receive.
        """
        self.path = path
        self.size = size
        self.direct = bool(O_DIRECT)
        self._missing = missing
        self._lock = threading.Lock()
        self._fd = -1
        self._sync_error: OSError | None = None

    def write(self, offset: int, data: memoryview, length: int) -> None:
        """Write data[:length] at an offset.

        Args:
            offset: The first byte's offset in the file, a multiple of 4096.
            data: Page-aligned memory, at least as long as the next multiple of 4096 after `length`: O_DIRECT writes the
                file's last block whole, and the excess is cut off afterwards.
            length: How many bytes belong to the file: a multiple of 4096, except at the file's end.

        Raises:
            OutputError: The system refused the write, or the sync after the last one.
        """
        with output_errors(self.path):
            fd = self._open()
            done = 0
            while done < length:
                direct = self.direct  # read once: another thread may switch to buffered writes at any moment
                whole = -(-(length - done) // PAGE) * PAGE if direct else length - done
                try:
                    done += os.pwrite(fd, data[done : done + whole], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    fd = self._switch_to_buffered()
            with self._lock:
                self._missing -= length
                last = self._missing == 0
            if last:
                self._finish()

    def sync(self) -> None:
        """Make all finished writes durable. Raises OutputError."""
        with output_errors(self.path), self._lock:
            self._fsync()

    def close(self) -> None:
        """Close the file if it is open."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> int:
        """Return the descriptor that all threads share, and open the file at the first call."""
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = os.open(self.path, os.O_WRONLY | (O_DIRECT if self.direct else 0))
                except OSError as error:
                    if error.errno != errno.EINVAL:  # some filesystems, network ones among them, refuse O_DIRECT here
                        raise
                    self.direct = False
                    self._fd = os.open(self.path, os.O_WRONLY)
            return self._fd

    def _switch_to_buffered(self) -> int:
        """Drop O_DIRECT from the shared descriptor: some filesystems accept the flag and then refuse the write."""
        with self._lock:
            if self.direct:
                set_direct(self._fd, False)
                self.direct = False
            return self._fd

    def _finish(self) -> None:
        """Cut off the part of the last block that is beyond the file's size, sync the file and close it."""
        os.ftruncate(self._fd, self.size)
        self._fsync()
        self.close()

    def _fsync(self) -> None:
        # After a failed sync the system drops the bytes that it could not write, so the next sync would succeed without
        # them. The first error is therefore raised again by every later sync.
        if self._sync_error is not None:
            raise self._sync_error
        try:
            if self._fd >= 0:
                os.fsync(self._fd)
        except OSError as error:
            self._sync_error = error
            raise


def set_direct(fd: int, direct: bool) -> None:
    """Switch O_DIRECT on or off for an open descriptor. Raises OSError where the filesystem does not support it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | O_DIRECT if direct else flags & ~O_DIRECT)


def read_back(path: str, start: int, memory: memoryview) -> int:
    """Fill memory with a file's bytes, read from the device where O_DIRECT is supported.

    Args:
        path: The file's path.
        start: The first byte's offset in the file, a multiple of 4096.
        memory: Page-aligned memory, a multiple of 4096 bytes long.

    Returns:
        The number of bytes read, which is less than len(memory) at the end of the file alone.

    Raises:
        OutputError: The file cannot be read.
    """
    done, length = 0, len(memory)
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            # A filesystem without O_DIRECT refuses the flag on the open descriptor, before anything has been read.
            with contextlib.suppress(OSError):
                set_direct(fd, True)
            while done < length:
                try:
                    count = os.preadv(fd, [memory[done:]], start + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT:
                        raise
                    set_direct(fd, False)
                    continue
                if not count:
                    break
                done += count
        finally:
            os.close(fd)
    return done
