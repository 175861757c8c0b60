"""The comparison of two results bit for bit, except for a NaN's payload, which the numerics contract leaves open."""

from __future__ import annotations

from typing import Any

import exact
import numpy as np


def differing(out: Any, expected: Any, dtype: str) -> Any:
    """Return the flat indices at which two arrays of bit patterns (unsigned, one shape) differ and are not both NaN."""
    assert out.shape == expected.shape
    out, expected = out.ravel(), expected.ravel()
    form = exact.FORMATS[dtype]
    mask, infinity = out.dtype.type(form.mask), out.dtype.type(form.infinity)
    at = np.flatnonzero(out != expected)
    return at[~((out[at] & mask > infinity) & (expected[at] & mask > infinity))]


def assert_same(out: Any, expected: Any, dtype: str) -> None:
    at = differing(out, expected, dtype)
    shown = [(int(i), hex(out.ravel()[i]), hex(expected.ravel()[i])) for i in at[:5]]
    assert not at.size, f"{at.size} of {out.size} differ; (index, got, expected): {shown}"
