"""Files that are durable, and names that change in one atomic step. The functions raise the system's own OSError."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

AT_FDCWD = -100  # renameat2: paths are relative to the current folder
RENAME_EXCHANGE = 2  # renameat2: swap both paths


def write_durably(path: str, parts: Iterable[bytes]) -> None:
    """Write a new file and sync it; the folders above it are created where they are missing.

    Raises FileExistsError if the name is taken: an existing file is never written into.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def place_under_free_name(source: str, target: str) -> None:
    """Give a file a name that must be free. Its old name stays as well where the filesystem has hard links.

    Raises FileExistsError if the new name is taken.
    """
    try:
        os.link(source, target)  # a link refuses a taken name, where a rename would replace the file
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):  # a filesystem without hard links
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(source, target)


def exchange(first: str, second: str) -> bool:
    """Swap two paths in one atomic step; return False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))
