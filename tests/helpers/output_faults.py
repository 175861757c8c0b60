"""Faults of the system during the writing of an output: calls that fail, and filesystems that lack a function."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import expo.output.atomic
import expo.output.direct_io
import expo.output.journal
from expo.output.direct_io import O_DIRECT


def refuse_to_sync(monkeypatch: pytest.MonkeyPatch, times: int, name: str = "") -> None:
    """Let the first `times` syncs of files with `name` in their names fail; later ones succeed, as on a bad disk."""
    real, calls = os.fsync, itertools.count()

    def fsync(fd: int) -> None:
        if name in os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) and next(calls) < times:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every open with O_DIRECT fail."""
    real = os.open

    def fake(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", fake)


def refuse_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every direct write fail after an open that succeeds."""
    real = os.pwrite

    def fake(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fake)


def refuse_at_third_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every direct write fail, except the first two."""
    real, calls = os.pwrite, itertools.count()

    def fake(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT and next(calls) >= 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fake)


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program run as on a system without O_DIRECT."""
    monkeypatch.setattr(expo.output.direct_io, "O_DIRECT", 0)


REFUSALS = [refuse_at_open, refuse_at_write, refuse_at_third_write, no_direct]


@contextlib.contextmanager
def c_library_whose(function: str, code: int | None) -> Iterator[None]:
    """Replace the C library by one whose function fails with this errno, or that lacks the function if it is None."""

    def fail(*_: Any) -> int:
        ctypes.set_errno(code or 0)
        return -1

    library = SimpleNamespace(**({function: fail} if code else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: library)
        yield


ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS]
CALLS = ["open", "pwrite", "fsync", "ftruncate", "rename", "mkdir", "link", "unlink", "allocate", "open()", "journal"]


class Fault:
    """A fault: the k-th call of one function fails with an OSError, once; calls on the inputs are not counted.

    Attributes:
        hit: True after the call has failed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, k: int, code: int) -> None:
        self.hit = False
        self._calls = itertools.count()
        self._k = k
        self._error = OSError(code, os.strerror(code))
        if call == "allocate":
            monkeypatch.setattr(expo.output.direct_io, call, self._wrap(expo.output.direct_io.allocate))
        elif call in ("open()", "journal"):
            module = expo.output.atomic if call == "open()" else expo.output.journal
            monkeypatch.setattr(module, "open", self._wrap(open), raising=False)
        else:
            monkeypatch.setattr(os, call, self._wrap(getattr(os, call)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*arguments: Any, **named: Any) -> Any:
            inside_an_input = isinstance(arguments[0], str) and {"sft", "al"} & set(Path(arguments[0]).parts)
            cleaning_up = sys._getframe(1).f_code.co_filename == shutil.__file__
            if not inside_an_input and not cleaning_up and next(self._calls) == self._k:
                self.hit = True
                raise self._error
            return real(*arguments, **named)

        return fake
