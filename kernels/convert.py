"""Operations besides the engines' one: conversion, the values of quantised elements, and the delta of an adapter.

    cast        out = round-to-nearest-even(x -> dtype of out), once; widening is exact
    dequantize  out = fp32(element) * scale, for quantised elements
    low_rank    delta[i, j] = scale * (left[i, 0] * right[0, j] + left[i, 1] * right[1, j] + ...)
    add_delta   out = f32(base) + f32(beta) * delta, where beta is 1 for aligned and 1 + alpha for the output

The arithmetic of low_rank is fp32, each multiplication and each addition rounds once, and the terms are added from left
to right. So NumPy and C give the same bits, and a part of the matrix that is computed alone has the bits of the whole.
The formula is LoRA's, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1. The
functions cast, dequantize and low_rank use the compiled code where the engine cpu is built, and NumPy elsewhere;
add_delta always uses NumPy. Bytes moved: cast and dequantize read and write each element once; low_rank only writes,
because the factors stay in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import numerics
from .contract import CODES, QUANTIZED, Operand
from .numerics import STORAGE, Array, check_floating_point_mode, narrow, widen

try:
    from . import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

CACHE_COLUMNS = 1 << 14  # the number of columns that NumPy computes at a time


def cast(
    source: Any, source_dtype: str, out: Any, out_dtype: str, n: int, before: Array | None = None
) -> tuple[int, int] | None:
    """Write n elements of source in out_dtype, rounded once.

    Args:
        source: A buffer of raw bytes.
        source_dtype: "BF16", "F16", "F32" or "F64".
        out: A writable buffer of raw bytes.
        out_dtype: A dtype of the same four.
        n: The number of elements.
        before: n elements of fp32 or fp64 that the result is compared with; None to count nothing.

    Returns:
        The counts (changed, non_finite) of `Statistics` against `before`; None without it.

    Raises:
        RuntimeError: The floating-point mode of this thread would give other bits.
    """
    compiled = source_dtype in CODES and out_dtype in CODES and (before is None or before.dtype == np.float32)
    if _cpu is not None and compiled:
        return _cpu.cast(source, CODES[source_dtype], out, CODES[out_dtype], n, before)
    check_floating_point_mode()
    x = widen(np.frombuffer(source, STORAGE[source_dtype], n), source_dtype)
    result = np.frombuffer(out, STORAGE[out_dtype], n)
    with np.errstate(all="ignore"):
        narrow(x, out_dtype, result)
        return None if before is None else numerics.count(before, result, out_dtype)


def dequantize(operand: Operand, out: Array) -> None:
    """Write the values of quantised elements, rounded once to fp32.

    Args:
        operand: The elements and their scales.
        out: fp32 of as many elements.

    Raises:
        ValueError: The scales do not cover the elements.
        RuntimeError: The floating-point mode of this thread would give other bits.
    """
    assert operand.scales is not None
    if _cpu is not None:
        from .cpu import scale_arguments

        scales = scale_arguments(operand.scales, out.size)
        assert scales is not None
        _cpu.dequantize(operand.memory, QUANTIZED[operand.dtype], out.size, scales, out)
        return
    check_floating_point_mode()
    operand.scales.check(out.size)
    numerics.dequantize(np.frombuffer(operand.memory, np.uint8, out.size), operand.dtype, operand.scales, out)


def low_rank(left: Array, right: Array, scale: float, first: int, out: Array) -> None:
    """Fill out with the elements of delta from number `first` on, in C order.

    Args:
        left: fp32 of shape (M, r), C-contiguous.
        right: fp32 of shape (r, N), C-contiguous.
        scale: The factor of the product.
        first: The number of the first element.
        out: fp32, one-dimensional.

    Raises:
        RuntimeError: The floating-point mode of this thread would give other bits.
    """
    if _cpu is not None:
        _cpu.low_rank(left, right, scale, left.shape[0], left.shape[1], right.shape[1], first, out.size, out)
        return
    check_floating_point_mode()
    width, done = right.shape[1], 0
    with np.errstate(all="ignore"):
        while done < out.size:
            row, column = divmod(first + done, width)
            stop = min(width, column + CACHE_COLUMNS, column + out.size - done)
            part = out[done : done + stop - column]
            part[:] = 0
            for k in range(left.shape[1]):
                part += left[row, k] * right[k, column:stop]
            part *= np.float32(scale)
            done += part.size


def add_delta(base: Array, delta: Array, beta: float, out: Array) -> None:
    """Write base + beta * delta to out. Each operation rounds once.

    Args:
        base: fp32 or fp64; out has the same dtype and shape.
        delta: fp32 of the same shape.
        beta: The factor of delta, rounded to the dtype of base.
        out: The memory of the result.

    Raises:
        RuntimeError: The floating-point mode of this thread would give other bits.
    """
    check_floating_point_mode()
    with np.errstate(all="ignore"):
        np.multiply(delta.astype(base.dtype, copy=False), base.dtype.type(beta), out=out)
        np.add(base, out, out=out)
