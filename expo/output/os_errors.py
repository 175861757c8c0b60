"""The system's errors about an output, as messages for a person."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ..errors import OutputError

FIXES = {
    errno.ENOSPC: "free some space or choose another `out`",
    errno.EDQUOT: "free some of your quota or choose another `out`",
    errno.EACCES: "choose an `out` that you may write to",
    errno.EPERM: "choose an `out` that you may write to",
    errno.EROFS: "the filesystem is read-only: choose another `out`",
    errno.EFBIG: "the filesystem or a limit (ulimit -f) refuses files of this size",
}


@contextlib.contextmanager
def output_errors(path: str) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that names the path and the fix."""
    try:
        yield
    except OSError as error:
        fix = FIXES.get(error.errno or 0)
        raise OutputError(f"{path}: {error.strerror or error}" + (f"; {fix}" if fix else "")) from error
