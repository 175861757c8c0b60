"""The compiled CPU engine: `_cpu.c`, found where it was built; F64 tensors go to NumPy.

Same bits as `numerics.py` at memcpy's speed, whatever the thread's floating-point mode; releases the GIL.
Bytes moved: one read of each input, one write per alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _cpu
from .contract import Statistics

CODE = {"BF16": 0, "F16": 1, "F32": 2}


def extrapolate(
    sft: Any,
    sft_dtype: str,
    aligned: Any,
    aligned_dtype: str,
    n: int,
    outs: Sequence[Any],
    alphas: Sequence[float],
    measure: bool,
) -> Statistics | None:
    """As numerics.extrapolate; a memory may also be an address (int), which the caller vouches for."""
    if "F64" in (sft_dtype, aligned_dtype):
        from . import numerics

        return numerics.extrapolate(sft, sft_dtype, aligned, aligned_dtype, n, outs, alphas, measure)
    moved = _cpu.extrapolate(sft, CODE[sft_dtype], aligned, CODE[aligned_dtype], n, tuple(outs), tuple(alphas), measure)
    return Statistics(*moved) if moved else None
