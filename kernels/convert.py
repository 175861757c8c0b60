"""What a merge needs besides extrapolation: another dtype for the output, and the delta of a low-rank adapter.

    cast        out = round-to-nearest-even(x -> dtype of out), once; widening is exact
    low_rank    delta[i, j] = scale * (left[i, 0] * right[0, j] + left[i, 1] * right[1, j] + ...)
    apply       out = f32(base) + f32(beta) * delta

All of low_rank is fp32, each multiplication and each addition rounds once, and the sum runs from the left: the same
bits from NumPy as from C, however the matrix is cut. The formula is LoRA's, "LoRA: Low-Rank Adaptation of Large
Language Models" (arXiv 2106.09685), section 4.1. Compiled where the CPU engine is built, NumPy elsewhere.
Bytes moved: cast one read and one write; low_rank one write, the factors stay in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import numerics
from .numerics import STORAGE, Array, check_floating_point_mode, narrow, widen

try:
    from . import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

CODE = {"BF16": 0, "F16": 1, "F32": 2}
COLUMNS = 1 << 14  # of a block in NumPy


def cast(
    source: Any, source_dtype: str, out: Any, out_dtype: str, n: int, before: Array | None = None
) -> tuple[int, int] | None:
    """Write n elements of source as out_dtype; both are buffers of raw bytes of "BF16", "F16", "F32" or "F64".

    Returns (changed, non_finite), as `Statistics` has them, against `before` of fp32 or fp64; None without it.
    Raises RuntimeError where the thread's floating-point mode would give other bits.
    """
    simple = source_dtype in CODE and out_dtype in CODE and (before is None or before.dtype == np.float32)
    if _cpu is not None and simple:
        return _cpu.cast(source, CODE[source_dtype], out, CODE[out_dtype], n, before)
    check_floating_point_mode()
    x = widen(np.frombuffer(source, STORAGE[source_dtype], n), source_dtype)
    result = np.frombuffer(out, STORAGE[out_dtype], n)
    with np.errstate(all="ignore"):
        narrow(x, out_dtype, result)
        return None if before is None else numerics.count(before, result, out_dtype)


def low_rank(left: Array, right: Array, scale: float, first: int, out: Array) -> None:
    """Fill out (fp32, 1-D) with delta's elements from number `first` on, in C order.

    left: fp32 [M, r]; right: fp32 [r, N]; both C-contiguous. Raises RuntimeError as `cast` does.
    """
    if _cpu is not None:
        _cpu.low_rank(left, right, scale, left.shape[0], left.shape[1], right.shape[1], first, out.size, out)
        return
    check_floating_point_mode()
    width, done = right.shape[1], 0
    with np.errstate(all="ignore"):
        while done < out.size:
            row, column = divmod(first + done, width)
            stop = min(width, column + COLUMNS, column + out.size - done)
            part = out[done : done + stop - column]
            part[:] = 0
            for k in range(left.shape[1]):
                part += left[row, k] * right[k, column:stop]
            part *= np.float32(scale)
            done += part.size


def apply(base: Array, delta: Array, beta: float, out: Array) -> None:
    """base + beta * delta, in base's dtype (fp32 or fp64), each operation rounded once; delta is fp32."""
    check_floating_point_mode()
    with np.errstate(all="ignore"):
        np.multiply(delta.astype(base.dtype, copy=False), base.dtype.type(beta), out=out)
        np.add(base, out, out=out)
