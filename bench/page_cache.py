"""Measure the share of a file that is in the page cache, and remove a file from the page cache without privileges."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def resident_share(paths: Sequence[Path]) -> float:
    """Return the share of the files' pages that are in the page cache, by mincore."""
    resident = total = 0
    for path in paths:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            memory = np.frombuffer(mapping, np.uint8)
            pages = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
            address, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(mapping))
            failed = _libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data))
            del memory  # a mapping that an array uses cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        resident += int((pages & 1).sum())
        total += len(pages)
    return resident / total


def evict(paths: Sequence[Path]) -> None:
    """Write dirty pages back and remove the files from the page cache; a filesystem in memory keeps them."""
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
