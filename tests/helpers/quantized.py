"""Quantised elements and their values, from the formats' definitions and without the code under test.

The value of an element is its number times its scale. The product of a number of at most 4 significant bits and a scale
of 24 is exact in fp64, so one conversion to fp32 rounds it once.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = Any
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats, version 1.0, section 5.3.3


def numbers(codes: Array, dtype: str) -> Array:
    """Return the numbers of elements, one in each byte, in fp64."""
    if dtype == "F8_E4M3":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]


def values(codes: Array, dtype: str, scales: Array, block: tuple[int, int]) -> Array:
    """Return the values, in fp32, of the elements of a matrix.

    Args:
        codes: uint8 of shape (rows, columns).
        dtype: F8_E4M3 or F4.
        scales: fp32, one for each block.
        block: The rows and the columns of a block.
    """
    rows, columns = codes.shape
    wide = np.repeat(np.repeat(scales.astype(np.float64), block[0], 0)[:rows], block[1], 1)[:, :columns]
    with np.errstate(all="ignore"):
        return (numbers(codes, dtype) * wide).astype(np.float32)


def e8m0(exponents: Array) -> Array:
    """Return the scales of MXFP4 in fp32: 2^(exponent - 127), and NaN for 255."""
    return np.where(exponents == 255, np.nan, np.ldexp(1.0, exponents.astype(np.int64) - 127)).astype(np.float32)


def unpack_mxfp4(blocks: Array) -> Array:
    """Return the elements of packed bytes [..., groups, 16], one in each byte, of shape [..., groups * 32]."""
    return np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-2], -1)
