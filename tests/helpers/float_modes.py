"""Work under another floating-point mode of the calling thread."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
import torch

from expo.dtypes import ITEMSIZE

T = TypeVar("T")


# numerics refuses these modes and the compiled engine works in them; values of <fenv.h> on x86-64.
ROUNDING_MODES = {"downward": 0x400, "upward": 0x800, "toward zero": 0xC00}


def pack(bits: Sequence[int], dtype: str) -> bytes:
    return b"".join(b.to_bytes(ITEMSIZE[dtype], "little") for b in bits)


def flushing(task: Callable[[], T]) -> T:
    """Run the task in a thread that flushes subnormals, and check that it still does so afterwards."""

    def run() -> T:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        try:
            result = task()
            assert (np.array([1e-40], np.float32) * np.float32(1))[0] == 0, "the mode was not restored"
            return result
        finally:
            torch.set_flush_denormal(False)

    return in_thread(run)


def rounding(mode: int, task: Callable[[], T]) -> T:
    """Run the task in a thread that rounds otherwise than to nearest, and check that it still does so afterwards."""
    library = ctypes.CDLL(None)

    def run() -> T:
        assert library.fesetround(mode) == 0
        try:
            result = task()
            assert library.fegetround() == mode, "the mode was not restored"
            return result
        finally:
            library.fesetround(0)

    return in_thread(run)


on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the modes' numbers are those of x86-64")


def in_thread(task: Callable[[], T]) -> T:
    """Floating-point modes belong to a thread: change them in one that ends afterwards."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(task).result()
