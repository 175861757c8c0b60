"""Run tasks under another floating-point mode of their thread."""

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


# NumPy's engine refuses these modes, and the compiled engine works in them; the values are <fenv.h>'s for x86-64.
ROUNDING_MODES = {"downward": 0x400, "upward": 0x800, "toward zero": 0xC00}


def pack(bits: Sequence[int], dtype: str) -> bytes:
    return b"".join(b.to_bytes(ITEMSIZE[dtype], "little") for b in bits)


def flushing(task: Callable[[], T]) -> T:
    """Run the task in a thread that flushes subnormals, and check that the thread still does so afterwards."""

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
    """Run the task in a thread with another rounding than to nearest, and check that the thread keeps it."""
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
    """Run the task in a thread of its own, because a floating-point mode belongs to a thread and ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(task).result()
