"""What every engine agrees on: dtype names, the working alpha, and the statistics of a merge.

    al = f32(alpha);  d = f32(aligned) - f32(sft);  p = al * d;  r = f32(aligned) + p
    out = round-to-nearest-even(r -> dtype of aligned)

Each fp32 operation rounds once; no fused multiply-add, no flush of subnormals. If either tensor is F64 the
same steps run in fp64 with alpha as a double. Alpha 0 is a copy of aligned, bit for bit: callers copy and
never ask an engine for it. The formula is ExPO's, "Model Extrapolation Expedites Alignment" (arXiv 2404.16792).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Statistics(NamedTuple):
    """How far a piece of a tensor moved; `d` is aligned - sft in fp32 (fp64 for F64 tensors).

    d_squared, aligned_squared: sums of d*d and aligned*aligned over the elements whose d is finite, accumulated in
        fp32 over short runs and in fp64 across them (relative error below 1e-5, as long as the squares of d and a are
        normal fp32 numbers).
    max_abs_d: the largest finite |d|.
    counts: for each alpha (changed, non_finite): outputs that compare unequal to aligned by IEEE's rule (-0 equals
        +0, NaN equals nothing), and outputs that are inf or NaN.
    """

    d_squared: float
    aligned_squared: float
    max_abs_d: float
    counts: tuple[tuple[int, int], ...]


def total(parts: Iterable[Statistics], alphas: int) -> Statistics:
    """The statistics of several pieces together; the sums are exact, so that their order does not show."""
    parts = list(parts)
    counts = tuple(
        (sum(part.counts[k][0] for part in parts), sum(part.counts[k][1] for part in parts)) for k in range(alphas)
    )
    d_squared = exact_sum(part.d_squared for part in parts)
    aligned_squared = exact_sum(part.aligned_squared for part in parts)
    return Statistics(d_squared, aligned_squared, max((part.max_abs_d for part in parts), default=0.0), counts)


def exact_sum(values: Iterable[float]) -> float:
    """Rounded once; inf where it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


# engine(sft, sft_dtype, aligned, aligned_dtype, n, outs, alphas, measure): n elements, memory as buffers of raw
# little-endian bytes at any address, one output buffer for each alpha; Statistics where `measure`, else None.
EngineFunction = Callable[[Any, str, Any, str, int, Sequence[Any], Sequence[float], bool], "Statistics | None"]


def working_alpha(alpha: float, *dtypes: str) -> float:
    """Alpha as the arithmetic of these dtypes uses it: rounded to fp32, or the double itself where one is F64.

    Raises ValueError for an alpha that is not finite in fp32, whatever the dtypes.
    """
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", alpha))
    except (OverflowError, struct.error):  # too large, or no number
        rounded = math.inf
    if abs(alpha) < 2.0**-126:  # subnormal in fp32: rounded in doubles, as the thread may flush the conversion's result
        rounded = math.copysign(math.ldexp(round(math.ldexp(abs(alpha), 149)), -149), alpha)
    if not math.isfinite(rounded):
        raise ValueError(f"alpha must be finite in float32, got {alpha!r}")
    return float(alpha) if "F64" in dtypes else float(rounded)
