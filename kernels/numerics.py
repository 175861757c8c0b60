"""The numerics contract in NumPy: the definition that every engine is tested against, and the fallback.

`contract.py` states the formula. NumPy has no bf16, so bf16 elements are stored as uint16, and integer arithmetic
rounds them. The engine computes one short run of elements after the other, so that its arrays stay in the cache. Bytes
moved: one read of each input, even if several terms name it, and one write for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .contract import Operand, Scales, Statistics, Term, buffer_of

Array = npt.NDArray[Any]

# The NumPy dtype in which the elements of a safetensors dtype are stored.
STORAGE: dict[str, type[np.generic]] = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "F8_E4M3": np.uint8, "F4": np.uint8,
}  # fmt: skip
# The number of elements that are summed in fp32; an fp32 sum of more equal terms would have an error above 1e-5.
SUM_ELEMENTS = 1 << 12
CACHE_ELEMENTS = 1 << 15  # the elements that are computed at a time; their fp32 temporaries fit into a 1 MiB cache


def extrapolate(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
    """Fill each output with the anchor plus the sum of all terms, rounded once to the anchor's dtype.

    Args:
        anchor: The operand that the sum starts from. It fixes the number of elements and the dtype of the outputs.
        terms: Any number of terms, added in this order.
        outputs: Memories of at least as many elements as the anchor has. If there is one output and `measure` is
            False, the output may be the memory of an input.
        measure: True to return the statistics, which are defined for a single term.

    Raises:
        EngineError: Statistics are asked for with another number of terms than one.
        RuntimeError: The floating-point mode of this thread would give other bits.
        ValueError: A memory is too small, or the number of a term's coefficients is not the number of outputs.
    """
    if measure and len(terms) != 1:
        raise EngineError(f"statistics are defined for one term, and there are {len(terms)}")
    if any(len(term.coefficients) != len(outputs) for term in terms):
        raise ValueError(f"each term needs as many coefficients as there are outputs, {len(outputs)}")
    check_floating_point_mode()
    n = anchor.elements
    operands = [anchor, *(operand for term in terms for operand in (term.plus, term.minus))]
    stored = {_key(operand): (operand, _array(operand.memory, operand.dtype, n)) for operand in operands}
    for operand, _ in stored.values():
        if operand.scales is not None:
            operand.scales.check(n)
    out_dtype = anchor.value_dtype
    outs = [_array(output, out_dtype, n) for output in outputs]
    work: Any = np.float64 if any(operand.dtype == "F64" for operand in operands) else np.float32
    rows = [[work(term.coefficients[k]) for term in terms] for k in range(len(outs))]
    totals, counts = [0.0, 0.0, 0.0], np.zeros((len(outs), 2), np.int64)
    with np.errstate(all="ignore"):
        for i in range(0, n, CACHE_ELEMENTS):
            run = slice(i, i + CACHE_ELEMENTS)
            wide: dict[Any, Array] = {
                key: _values(operand, x[run], i).astype(work, copy=False) for key, (operand, x) in stored.items()
            }
            o = wide[_key(anchor)]
            differences = [wide[_key(term.plus)] - wide[_key(term.minus)] for term in terms]
            for k, out in enumerate(outs):
                narrow(_sum(o, rows[k], differences), out_dtype, out[run])
                if measure:
                    counts[k] += count(o, out[run], out_dtype)
            if measure:
                accumulate(totals, o, differences[0])
    if not measure:
        return None
    return Statistics(totals[0], totals[1], totals[2], tuple((int(c), int(f)) for c, f in counts))


def _key(operand: Operand) -> tuple[int, str, int]:
    """Return the same key for two operands of the same memory, dtype and scales: their elements are read once."""
    return id(operand.memory), operand.dtype, id(operand.scales)


def _values(operand: Operand, x: Array, first: int) -> Array:
    """Return the values of elements x of an operand, from its element number `first` on, in fp32 or fp64."""
    if operand.scales is None:
        return widen(x, operand.dtype)
    out = np.empty(x.size, np.float32)
    dequantize(x, operand.dtype, operand.scales._replace(first=operand.scales.first + first), out)
    return out


def _array(memory: Any, dtype: str, n: int) -> Array:
    """Return the first n elements of a memory as an array, which is writable where the memory is."""
    return np.frombuffer(buffer_of(memory), STORAGE[dtype], n)


def _sum(o: Array, coefficients: Sequence[Any], differences: Sequence[Array]) -> Array:
    """Return o plus each coefficient times its difference, in order; each operation rounds once."""
    r = o
    for c, d in zip(coefficients, differences, strict=True):
        p = c * d
        p += r
        r = p
    return r


def widen(x: Array, dtype: str) -> Array:
    """Return elements that are stored as STORAGE[dtype] in float32, which is exact; F32 and F64 stay unchanged."""
    if dtype == "BF16":
        bits = x.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return x.astype(np.float32) if dtype == "F16" else x


def _number(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Return the number of a small format with a sign, these bits, the usual bias, and no infinity."""
    sign = -1.0 if bits >> (exponent_bits + mantissa_bits) else 1.0
    exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    leading = int(exponent > 0)  # subnormal numbers have no leading one, and the exponent 1
    return sign * (leading + mantissa / (1 << mantissa_bits)) * 2.0 ** (max(exponent, 1) - bias)


# The numbers of all codes, in fp32. E4M3 has NaN where all bits but the sign are set, and E2M1 has no NaN. Sources:
# "FP8 Formats for Deep Learning" (arXiv 2209.05433), and the OCP Microscaling Formats specification, version 1.0.
NUMBERS = {
    "F8_E4M3": np.array([_number(k, 4, 3) if k & 0x7F < 0x7F else np.nan for k in range(256)], np.float32),
    "F4": np.array([_number(k & 15, 2, 1) for k in range(256)], np.float32),
}


def dequantize(codes: Array, dtype: str, scales: Scales, out: Array) -> None:
    """Write fp32(code) * scale, rounded once.

    Args:
        codes: The elements, in uint8.
        dtype: A name of `contract.QUANTIZED`.
        scales: The scales; `Scales.first` is the number of the first of these elements.
        out: fp32 of the same size.
    """
    row, column = np.divmod(np.arange(scales.first, scales.first + codes.size), scales.width)
    height, width = scales.block
    with np.errstate(all="ignore"):
        np.multiply(NUMBERS[dtype][codes], scales.values[row // height, column // width], out=out)


def narrow(r: Array, dtype: str, out: Array) -> None:
    """Round r, in float32 or float64, to nearest even once, and write the result to `out`, stored as STORAGE[dtype]."""
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
    nan = r != r  # This test comes before the rounding, which would carry 0x7fffffff over into -0.
    if nan.any():
        rounded[nan] = 0x7FC0
    out[...] = rounded


def round_to_odd(r: Array) -> Array:
    """Round float64 to float32 such that a second rounding, to 8 significant bits, gives the result of one rounding.

    Inexact values become the neighbour towards zero with its last bit set (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008).
    """
    near = r.astype(np.float32)
    bits = near.view(np.uint32)
    exact = near.astype(np.float64)
    bits -= (np.abs(exact) > np.abs(r)).astype(np.uint32)
    bits |= ((exact != r) & (r == r)).astype(np.uint32)
    return near


def count(before: Array, out: Array, dtype: str) -> tuple[int, int]:
    """Return two numbers: of the elements of `out` that differ from `before`, and of those that are inf or NaN.

    Args:
        before: Elements in float32 or float64.
        out: As many elements, stored as STORAGE[dtype].
        dtype: The dtype of `out`.
    """
    after = widen(out, dtype)
    return int(np.count_nonzero(after != before)), int(out.size - np.count_nonzero(np.isfinite(after)))


def accumulate(totals: list[float], x: Array, d: Array) -> None:
    """Add elements to the totals [sum of d*d, sum of x*x, max |d|]; an element whose d is not finite is left out."""
    finite = np.isfinite(d)
    if not finite.all():
        x, d = x[finite], d[finite]
    for i in range(0, d.size, SUM_ELEMENTS):
        totals[0] += float(np.dot(d[i : i + SUM_ELEMENTS], d[i : i + SUM_ELEMENTS]))
        totals[1] += float(np.dot(x[i : i + SUM_ELEMENTS], x[i : i + SUM_ELEMENTS]))
    if d.size:
        totals[2] = max(totals[2], float(np.abs(d).max()))


# These are 2^-149, 2^-126, 1 and 1 + 2^-23 by their bits: a conversion would flush them if the mode is set at import.
_TINY = np.array([1, 0x00800000, 0x3F800000, 0x3F800001], np.uint32).view(np.float32)
_HALF = np.array([1.0, 0.5, 2.0**-24, 2.0**-24], np.float32)


def check_floating_point_mode() -> None:
    """Raise RuntimeError if the mode of this thread flushes subnormals or does not round to nearest even.

    NumPy computes in the mode of the thread. The call torch.set_flush_denormal(True) sets such a mode.
    """
    product = _TINY[:2] * _HALF[:2]
    total = _TINY[2:] + _HALF[2:]
    if not (product[0] > 0 and product[1] > 0 and total[0] == 1.0 and total[1] > _TINY[3]):
        raise RuntimeError(
            "this thread's floating-point mode flushes subnormals or does not round to nearest even, and the "
            "NumPy engine would follow it: call torch.set_flush_denormal(False), or use the compiled engine (cpu)"
        )
