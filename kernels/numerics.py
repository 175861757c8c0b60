"""The numerics contract in NumPy: the definition every engine is tested against, and the fallback.

`contract.py` states the formula. bf16 has no NumPy dtype: its bits travel as uint16 and are rounded with integer
arithmetic. Work goes in blocks that stay in the cache; bytes moved: one read of each input, one write per alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import Statistics

Array = npt.NDArray[Any]

STORAGE: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
RUN = 1 << 12  # elements summed in fp32 at a time: a longer running sum of like terms would err by more than 1e-5
BLOCK = 1 << 15  # elements: the block's few fp32 temporaries stay in a 1 MiB cache


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
    """Write round(aligned + alpha * (aligned - sft)) into outs[k] for each alphas[k].

    sft, aligned, outs: C-contiguous buffers of at least n elements of dtype sft_dtype, aligned_dtype and
    aligned_dtype ("BF16", "F16", "F32", "F64"). With one alpha and measure False the output may be an input's
    memory. Raises RuntimeError where the thread's floating-point mode would give other bits.
    """
    check_floating_point_mode()
    s = np.frombuffer(sft, STORAGE[sft_dtype], n)
    a = np.frombuffer(aligned, STORAGE[aligned_dtype], n)
    os = [np.frombuffer(out, STORAGE[aligned_dtype], n) for out in outs]
    work = np.float64 if "F64" in (sft_dtype, aligned_dtype) else np.float32
    als: list[Any] = [work(alpha) for alpha in alphas]
    totals = [0.0, 0.0, 0.0]
    counts = np.zeros((len(als), 2), np.int64)
    with np.errstate(all="ignore"):
        for i in range(0, n, BLOCK):
            x = widen(a[i : i + BLOCK], aligned_dtype).astype(work, copy=False)
            d = x - widen(s[i : i + BLOCK], sft_dtype)
            for k, al in enumerate(als):
                r = al * d
                r += x
                narrow(r, aligned_dtype, os[k][i : i + BLOCK])
                if measure:
                    counts[k] += count(x, os[k][i : i + BLOCK], aligned_dtype)
            if measure:
                accumulate(totals, x, d)
    if not measure:
        return None
    return Statistics(totals[0], totals[1], totals[2], tuple((int(c), int(f)) for c, f in counts))


def widen(x: Array, dtype: str) -> Array:
    """Elements of storage dtype to float32, exactly; F64 and F32 stay what they are."""
    if dtype == "BF16":
        bits = x.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return x.astype(np.float32) if dtype == "F16" else x


def narrow(r: Array, dtype: str, out: Array) -> None:
    """Round r (float32 or float64) once, to nearest even, into out of storage dtype."""
    if dtype != "BF16":
        out[...] = r
        return
    if r.dtype == np.float64:
        r = round_to_odd(r)
    bits = r.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = r != r  # tested before rounding, which would carry 0x7fffffff over into -0
    if nan.any():
        rounded[nan] = 0x7FC0
    out[...] = rounded


def round_to_odd(r: Array) -> Array:
    """float64 to float32 such that a second rounding, to 8 bits, is the rounding of r itself.

    Inexact values take the neighbour towards zero with its last bit set (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008).
    """
    near = r.astype(np.float32)
    bits = near.view(np.uint32)
    exact = near.astype(np.float64)
    bits -= (np.abs(exact) > np.abs(r)).astype(np.uint32)
    bits |= ((exact != r) & (r == r)).astype(np.uint32)
    return near


def count(before: Array, out: Array, dtype: str) -> tuple[int, int]:
    """Elements of out that changed from `before` (aligned, widened), and that are not finite."""
    after = widen(out, dtype)
    return int(np.count_nonzero(after != before)), int(out.size - np.count_nonzero(np.isfinite(after)))


def accumulate(totals: list[float], x: Array, d: Array) -> None:
    """Add a block to [sum of d*d, sum of aligned*aligned, max |d|], elements with finite d alone."""
    finite = np.isfinite(d)
    if not finite.all():
        x, d = x[finite], d[finite]
    for i in range(0, d.size, RUN):
        totals[0] += float(np.dot(d[i : i + RUN], d[i : i + RUN]))
        totals[1] += float(np.dot(x[i : i + RUN], x[i : i + RUN]))
    if d.size:
        totals[2] = max(totals[2], float(np.abs(d).max()))


# 2^-149, 2^-126, 1 and 1 + 2^-23 by their bits: a conversion would flush them if the mode is set at import.
_TINY = np.array([1, 0x00800000, 0x3F800000, 0x3F800001], np.uint32).view(np.float32)
_HALF = np.array([1.0, 0.5, 2.0**-24, 2.0**-24], np.float32)


def check_floating_point_mode() -> None:
    """Refuse a thread that flushes subnormals or does not round to nearest even: NumPy would follow it.

    Raises RuntimeError; torch.set_flush_denormal(True) sets such a mode.
    """
    product = _TINY[:2] * _HALF[:2]
    total = _TINY[2:] + _HALF[2:]
    if not (product[0] > 0 and product[1] > 0 and total[0] == 1.0 and total[1] > _TINY[3]):
        raise RuntimeError(
            "this thread's floating-point mode flushes subnormals or rounds otherwise than to nearest even, and the "
            "NumPy engine would follow it: call torch.set_flush_denormal(False), or use the compiled engine (cpu)"
        )
