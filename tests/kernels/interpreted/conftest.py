"""These tests run the Triton kernel in Triton's interpreter, on a CPU; `test_interpreter.py` starts them.

Triton reads TRITON_INTERPRET when a kernel is defined, so the tests need a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*.py"]

if INTERPRETED:
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    UNPATCHED: Callable[..., Any] = interpreter._convert_float


def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Convert between fp32 and bf16 as a GPU does, to nearest even; the interpreter's own downcast truncates."""
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        half, odd = np.uint64(0x7FFF), (bits >> np.uint64(16)) & np.uint64(1)
        rounded = ((bits + half + odd) >> np.uint64(16)).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FFF), rounded)  # the NaN that NVIDIA's conversion gives
    if (source, target) == (tl.bfloat16, tl.float32):
        return data.astype(np.uint32) << np.uint32(16)
    return UNPATCHED(data, source, target, rounding_mode)


@pytest.fixture
def unpatched() -> Callable[..., Any]:
    """Return the interpreter's own conversion."""
    return UNPATCHED


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make conversions round, and suppress NumPy's warnings of infinities and NaNs, which the tests use on purpose."""
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    with np.errstate(all="ignore"):
        yield
