"""Measure how far apart two tensors are, in NumPy, for one thread at a time.

Both tensors are widened to fp32 (fp64 if one of them is F64), which is exact, and d = aligned - sft is rounded once to
that dtype, as in a merge. Squares and products are summed in that dtype over runs of RUN elements, and in fp64 across
the runs. A block whose sums leave the range in which fp32 is exact enough is computed again in fp64. Sums are over the
elements whose d is finite.

The relative error of the sums is below 1e-6; the error of d_aligned is relative to |d| |aligned|. Bytes moved: one read
of each input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..kernels import convert
from ..kernels.contract import exact_sum
from ..kernels.numerics import Array

BLOCK = 1 << 16  # elements; the fastest of 2^14 to 2^17, as its temporaries stay in a cache of 1 MiB
RUN = 1 << 11  # elements of one dot product: few enough for fp32, and for BLAS to use one thread
LEAST_SUM = 1e-25  # a sum of squares above it is exact enough, although fp32 loses squares below 2^-126


class DistanceSums(NamedTuple):
    """Sums over a run of elements, or over several runs.

    Attributes:
        elements: The number of elements.
        d_squared: The sum of the squares of d = aligned - sft.
        sft_squared: The sum of the squares of sft.
        aligned_squared: The sum of the squares of aligned.
        d_aligned: The sum of the products of d and aligned.
        max_abs_d: The largest absolute value of d.
        changed: The number of elements whose values differ; -0 equals +0, and NaN equals NaN.
        sft_non_finite: The number of elements of sft that are inf or NaN.
        aligned_non_finite: The number of elements of aligned that are inf or NaN.
    """

    elements: int = 0
    d_squared: float = 0.0
    sft_squared: float = 0.0
    aligned_squared: float = 0.0
    d_aligned: float = 0.0
    max_abs_d: float = 0.0
    changed: int = 0
    sft_non_finite: int = 0
    aligned_non_finite: int = 0


def total(parts: Iterable[DistanceSums]) -> DistanceSums:
    """Return the sums of several runs. They are exact and rounded once, so they do not depend on the order."""
    parts = list(parts)
    if not parts:
        return DistanceSums()
    n, d, s, a, da, largest, changed, sft_non_finite, aligned_non_finite = zip(*parts, strict=True)
    exact = exact_sum(d), exact_sum(s), exact_sum(a), exact_sum(da)
    return DistanceSums(sum(n), *exact, max(largest), sum(changed), sum(sft_non_finite), sum(aligned_non_finite))


class DistanceMeter:
    """Measures blocks of elements. Every thread needs a meter of its own, because a meter has memory for one block."""

    def __init__(self) -> None:
        self._scratch: dict[str, tuple[Array, ...]] = {}
        self._differs = np.empty(BLOCK, np.bool_)

    def measure(self, sft: Any, sft_dtype: str, aligned: Any, aligned_dtype: str, n: int) -> Iterator[DistanceSums]:
        """Yield the sums of n elements, block by block.

        Args:
            sft: The raw bytes of n elements, at any address.
            sft_dtype: The safetensors name of their dtype.
            aligned: The same for aligned.
            aligned_dtype: The same for aligned.
            n: The number of elements.
        """
        work = "F64" if "F64" in (sft_dtype, aligned_dtype) else "F32"
        if work not in self._scratch:
            self._scratch[work] = tuple(np.empty(BLOCK, "f8" if work == "F64" else "f4") for _ in range(3))
        items = len(sft) // max(n, 1), len(aligned) // max(n, 1)
        with np.errstate(all="ignore"):
            for i in range(0, n, BLOCK):
                count = min(BLOCK, n - i)
                s, a, d = (scratch[:count] for scratch in self._scratch[work])
                convert.cast(sft[i * items[0] : (i + count) * items[0]], sft_dtype, s, work, count)
                convert.cast(aligned[i * items[1] : (i + count) * items[1]], aligned_dtype, a, work, count)
                yield self._measure_block(s, a, d)

    def _measure_block(self, s: Array, a: Array, d: Array) -> DistanceSums:
        """Return the sums of one block; d is memory for the difference."""
        changed = int(np.count_nonzero(np.not_equal(a, s, out=self._differs[: a.size])))
        aligned_squared = _dot(a, a)
        if not changed and (LEAST_SUM < aligned_squared < np.inf or not a.any()):
            return DistanceSums(a.size, sft_squared=aligned_squared, aligned_squared=aligned_squared)
        np.subtract(a, s, out=d)
        squares = _dot(d, d), _dot(s, s), aligned_squared
        if not LEAST_SUM < min(squares) <= max(squares) < np.inf:
            return _measure_in_fp64(s, a, d)
        return DistanceSums(a.size, *squares, _dot(d, a), max(float(d.max()), -float(d.min())), changed)


def _measure_in_fp64(s: Array, a: Array, d: Array) -> DistanceSums:
    """Return the sums of a block with elements that are not finite, or with squares too large or small for fp32."""
    non_finite = [int(x.size - np.count_nonzero(np.isfinite(x))) for x in (s, a)]
    changed = int(np.count_nonzero((a != s) & ~(np.isnan(a) & np.isnan(s))))
    finite = np.isfinite(d)
    x, y, z = (each[finite].astype(np.float64) for each in (d, s, a))
    largest = float(np.abs(x).max()) if x.size else 0.0
    return DistanceSums(s.size, _dot(x, x), _dot(y, y), _dot(z, z), _dot(x, z), largest, changed, *non_finite)


def _dot(x: Array, y: Array) -> float:
    """Return the sum of the products; runs of a fixed length give the same bits for any number of BLAS threads."""
    whole = x.size // RUN * RUN
    runs = np.matmul(x[:whole].reshape(-1, 1, RUN), y[:whole].reshape(-1, RUN, 1))
    return float(runs.sum(dtype=np.float64)) + float(np.dot(x[whole:], y[whole:]))
