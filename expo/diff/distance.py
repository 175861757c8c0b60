"""How far apart two tensors are, in NumPy: what a comparison adds up, for one thread at a time.

Both are widened to fp32 (fp64 where one is F64), which is exact, and d = aligned - sft is rounded once to that, as in
a merge. Squares and products are summed in that over runs of RUN elements and in fp64 across them; a block whose sums
leave the range in which fp32 is good for it is done again in fp64. Sums are over the elements whose d is finite.
Relative error of the sums below 1e-6; that of d_aligned is of |d| |aligned|. Bytes moved: one read of each input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..kernels import convert
from ..kernels.contract import exact_sum
from ..kernels.numerics import Array

BLOCK = 1 << 16  # elements: of 2^14 to 2^17 it was the fastest; the temporaries stay in a 1 MiB cache
RUN = 1 << 11  # elements of one dot product: few enough for fp32, and for BLAS to keep them in one thread
LEAST = 1e-25  # of a sum of squares: what fp32 loses of squares below 2^-126 does not show in it


class Sums(NamedTuple):
    """Of a run of elements, or of several.

    changed: elements whose values differ; -0 equals +0, and NaN equals NaN. sft_bad, aligned_bad: inf and NaN.
    """

    elements: int = 0
    d_squared: float = 0.0
    sft_squared: float = 0.0
    aligned_squared: float = 0.0
    d_aligned: float = 0.0
    max_abs_d: float = 0.0
    changed: int = 0
    sft_bad: int = 0
    aligned_bad: int = 0


def total(parts: Iterable[Sums]) -> Sums:
    """Several together; the sums are exact and rounded once, so that their order does not show."""
    parts = list(parts)
    if not parts:
        return Sums()
    n, d, s, a, da, top, changed, sft_bad, aligned_bad = zip(*parts, strict=True)
    exact = exact_sum(d), exact_sum(s), exact_sum(a), exact_sum(da)
    return Sums(sum(n), *exact, max(top), sum(changed), sum(sft_bad), sum(aligned_bad))


class Meter:
    """Measures; one for each thread, as it has the memory for a block."""

    def __init__(self) -> None:
        self._scratch: dict[str, tuple[Array, ...]] = {}
        self._differs = np.empty(BLOCK, np.bool_)

    def blocks(self, sft: Any, sft_dtype: str, aligned: Any, aligned_dtype: str, n: int) -> Iterator[Sums]:
        """n elements of both, as buffers of raw bytes at any address; a block at a time."""
        work = "F64" if "F64" in (sft_dtype, aligned_dtype) else "F32"
        if work not in self._scratch:
            self._scratch[work] = tuple(np.empty(BLOCK, "f8" if work == "F64" else "f4") for _ in range(3))
        items = len(sft) // max(n, 1), len(aligned) // max(n, 1)
        with np.errstate(all="ignore"):
            for i in range(0, n, BLOCK):
                some = min(BLOCK, n - i)
                s, a, d = (scratch[:some] for scratch in self._scratch[work])
                convert.cast(sft[i * items[0] : (i + some) * items[0]], sft_dtype, s, work, some)
                convert.cast(aligned[i * items[1] : (i + some) * items[1]], aligned_dtype, a, work, some)
                yield self._block(s, a, d)

    def _block(self, s: Array, a: Array, d: Array) -> Sums:
        changed = int(np.count_nonzero(np.not_equal(a, s, out=self._differs[: a.size])))
        aligned_squared = _dot(a, a)
        if not changed and (LEAST < aligned_squared < np.inf or not a.any()):
            return Sums(a.size, sft_squared=aligned_squared, aligned_squared=aligned_squared)
        np.subtract(a, s, out=d)
        squares = _dot(d, d), _dot(s, s), aligned_squared
        if not LEAST < min(squares) <= max(squares) < np.inf:
            return _careful(s, a, d)
        return Sums(a.size, *squares, _dot(d, a), max(float(d.max()), -float(d.min())), changed)


def _careful(s: Array, a: Array, d: Array) -> Sums:
    """A block with elements that are not finite, or whose squares are too large or too small for fp32."""
    bad = [int(x.size - np.count_nonzero(np.isfinite(x))) for x in (s, a)]
    changed = int(np.count_nonzero((a != s) & ~(np.isnan(a) & np.isnan(s))))
    finite = np.isfinite(d)
    x, y, z = (each[finite].astype(np.float64) for each in (d, s, a))
    top = float(np.abs(x).max()) if x.size else 0.0
    return Sums(s.size, _dot(x, x), _dot(y, y), _dot(z, z), _dot(x, z), top, changed, *bad)


def _dot(x: Array, y: Array) -> float:
    """The sum of the products, by runs of a fixed length: the same bits whatever the number of BLAS's threads."""
    whole = x.size // RUN * RUN
    runs = np.matmul(x[:whole].reshape(-1, 1, RUN), y[:whole].reshape(-1, RUN, 1))
    return float(runs.sum(dtype=np.float64)) + float(np.dot(x[whole:], y[whole:]))
