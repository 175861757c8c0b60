"""Page-aligned memory, which reads and writes past the page cache need."""

from __future__ import annotations

import contextlib
import mmap

PAGE = 4096  # bytes: O_DIRECT needs memory, offset and length in multiples of the device's block, at most a page
MIB = 1 << 20


def page_aligned(size: int) -> memoryview:
    """Return anonymous memory of `size` bytes that starts on a page, in huge pages where the system has them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
