"""Allocate page-aligned memory, which reads and writes past the page cache need."""

from __future__ import annotations

import contextlib
import mmap

# Bytes of a page. O_DIRECT needs memory, offset and length in multiples of the device's block, which is at most a page.
PAGE = 4096
MIB = 1 << 20


def page_aligned(size: int) -> memoryview:
    """Return `size` bytes of anonymous memory that starts on a page; the system may give huge pages."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
