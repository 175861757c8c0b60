"""This module is the numerics contract in exact rational arithmetic, a reference that shares no code with any engine.

Values are fractions, and Python's `round` rounds them, exactly and half to even. The code is slow, but short enough to
be checked by reading.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import Enum
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """A binary IEEE format: its width, the bits of its fraction, and the exponent of its least normal number."""

    bits: int
    fraction: int
    least: int

    @property
    def mask(self) -> int:
        """Return the number whose bits are all one except the sign."""
        return (1 << (self.bits - 1)) - 1

    @property
    def infinity(self) -> int:
        """Return the bits of +inf: all bits of the exponent are one, and the fraction is zero."""
        return self.mask >> self.fraction << self.fraction


FORMATS = {
    "BF16": Format(16, 7, -126),
    "F16": Format(16, 10, -14),
    "F32": Format(32, 23, -126),
    "F64": Format(64, 52, -1022),
}


class Kind(Enum):
    FINITE = "finite"
    INFINITE = "infinite"
    NAN = "nan"


class Value(NamedTuple):
    """A number with its sign, which zeros have too; `size` is the magnitude of a finite number."""

    kind: Kind
    negative: bool
    size: Fraction = Fraction(0)

    def __neg__(self) -> Value:
        return self._replace(negative=not self.negative)


NAN = Value(Kind.NAN, False)


def decode(bits: int, dtype: str) -> Value:
    """Return the value of a bit pattern."""
    form = FORMATS[dtype]
    negative, magnitude = bool(bits >> (form.bits - 1)), bits & form.mask
    if magnitude >= form.infinity:
        return NAN if magnitude > form.infinity else Value(Kind.INFINITE, negative)
    exponent, fraction = magnitude >> form.fraction, magnitude & ((1 << form.fraction) - 1)
    significand = fraction if exponent == 0 else fraction + (1 << form.fraction)
    return Value(Kind.FINITE, negative, significand * power_of_two(form.least - form.fraction + max(exponent - 1, 0)))


def encode(value: Value, dtype: str) -> int:
    """Return the bit pattern of a value, rounded once to nearest even; every NaN gives the positive quiet NaN."""
    form = FORMATS[dtype]
    if value.kind is Kind.NAN:
        return form.infinity | 1 << (form.fraction - 1)
    sign = int(value.negative) << (form.bits - 1)
    if value.kind is Kind.INFINITE:
        return sign | form.infinity
    scale = max(exponent_of(value.size), form.least) if value.size else form.least
    significand = round(value.size / power_of_two(scale - form.fraction))  # exact, half to even
    # If the significand has reached the next power of two, the sum of the bits carries into the exponent.
    return sign | min(significand + ((scale - form.least) << form.fraction), form.infinity)


def rounded(value: Value, dtype: str) -> Value:
    """Return the nearest value of a format, which is infinity past the largest finite value."""
    return decode(encode(value, dtype), dtype)


def power_of_two(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def exponent_of(size: Fraction) -> int:
    """Return the e with 2^e <= size < 2^(e+1)."""
    e = size.numerator.bit_length() - size.denominator.bit_length()
    return e if size >= power_of_two(e) else e - 1


def add(x: Value, y: Value) -> Value:
    """Return the exact sum; a zero sum is +0 unless both terms are negative, which is IEEE's rule for this rounding."""
    if Kind.NAN in (x.kind, y.kind):
        return NAN
    if Kind.INFINITE in (x.kind, y.kind):
        if x.kind is y.kind and x.negative != y.negative:
            return NAN
        return x if x.kind is Kind.INFINITE else y
    total = (-x.size if x.negative else x.size) + (-y.size if y.negative else y.size)
    return Value(Kind.FINITE, x.negative and y.negative if total == 0 else total < 0, abs(total))


def multiply(x: Value, y: Value) -> Value:
    """Return the exact product; a zero has the sign of its factors, and inf * 0 is NaN."""
    if Kind.NAN in (x.kind, y.kind):
        return NAN
    negative = x.negative != y.negative
    if Kind.INFINITE in (x.kind, y.kind):
        zero = any(v.kind is Kind.FINITE and v.size == 0 for v in (x, y))
        return NAN if zero else Value(Kind.INFINITE, negative)
    return Value(Kind.FINITE, negative, x.size * y.size)


def working(alpha: float, dtype: str) -> Value:
    """Return alpha, a double, rounded to the format of the arithmetic."""
    return rounded(decode(struct.unpack("<Q", struct.pack("<d", alpha))[0], "F64"), dtype)


def extrapolate(sft: int, sft_dtype: str, aligned: int, aligned_dtype: str, alpha: float, fused: bool = False) -> int:
    """Return aligned + alpha * (aligned - sft) of bit patterns, by the contract; a NaN has one fixed payload.

    With `fused` the product and the sum are rounded together, which the contract forbids.
    """
    work = "F64" if "F64" in (sft_dtype, aligned_dtype) else "F32"
    a = decode(aligned, aligned_dtype)
    d = rounded(add(a, -decode(sft, sft_dtype)), work)
    p = multiply(working(alpha, work), d)
    if not fused:
        p = rounded(p, work)
    return encode(rounded(add(a, p), work), aligned_dtype)


Stored = tuple[int, str]  # an element: its bit pattern and its dtype


def combine(anchor: Stored, terms: Sequence[tuple[float, Stored, Stored]]) -> int:
    """Return the bit pattern of anchor + coefficient * (plus - minus) + ..., by the contract, in the anchor's dtype.

    Args:
        anchor: The element that the sum starts from.
        terms: For each term its coefficient and its two elements, added in this order.
    """
    elements = [anchor, *(element for _, *pair in terms for element in pair)]
    work = "F64" if any(dtype == "F64" for _, dtype in elements) else "F32"
    r = decode(*anchor)
    for coefficient, plus, minus in terms:
        d = rounded(add(decode(*plus), -decode(*minus)), work)
        p = rounded(multiply(working(coefficient, work), d), work)
        r = rounded(add(r, p), work)
    return encode(r, anchor[1])


def is_nan(bits: int, dtype: str) -> bool:
    return bits & FORMATS[dtype].mask > FORMATS[dtype].infinity


def specials(dtype: str) -> list[int]:
    """Return bit patterns at which engines go wrong: the limits of the format and the roundings to narrower formats."""
    form = FORMATS[dtype]
    one = encode(Value(Kind.FINITE, False, Fraction(1)), dtype)
    least_normal, quiet = 1 << form.fraction, form.infinity | 1 << (form.fraction - 1)
    magnitudes = [0, 1, 2, 3, least_normal - 1, least_normal, least_normal + 1, one - 1, one, one + 1]
    magnitudes += [form.infinity - 1, form.infinity, form.infinity + 1, quiet, form.mask]
    magnitudes += [encode(Value(Kind.FINITE, False, size), dtype) for size in rounding_edges()]
    distinct = dict.fromkeys(magnitudes)
    return [*distinct, *(magnitude | 1 << (form.bits - 1) for magnitude in distinct)]


def rounding_edges() -> list[Fraction]:
    """Return ties between two values of narrower formats, and their neighbours.

    The ties round to the even value below or above, to infinity, and to zero.
    """
    edges = []
    for form in (FORMATS["BF16"], FORMATS["F16"], FORMATS["F32"]):
        ulp = power_of_two(-form.fraction)
        largest = 1 - form.least  # the exponent of the largest finite number
        ties = [1 + ulp / 2, 1 + ulp * 3 / 2, (2 - ulp / 2) * power_of_two(largest), power_of_two(form.least) * ulp / 2]
        for tie in ties:
            # fp32 loses the 2^-40, which decides how fp64 rounds: a conversion in two steps gives another result.
            edges += [tie, tie * (1 + power_of_two(-40)), tie * (1 - power_of_two(-40)), tie * (1 - power_of_two(-20))]
    return edges
