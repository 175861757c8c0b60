"""The numerics contract in torch's own operations: an engine for devices and dtypes that have no Triton kernel.

`contract.py` states the formula. The operations take several passes over memory. They give the same bits on every
device whose sub, mul and add for fp32 in torch round to nearest even and keep subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import EngineError
from .contract import Operand, Statistics, Term, check_no_scales

EAGER_ELEMENTS = 1 << 24  # the elements that are computed at a time; the temporaries of a term take 16 bytes for each


def extrapolate(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
    """Compute any number of terms as `numerics.extrapolate` does; every memory is a contiguous tensor on one device.

    Raises:
        EngineError: An operand has scales, or `measure` is set, as this engine has no statistics.
    """
    check_no_scales(anchor, terms)
    if measure:
        raise EngineError("the engine of torch's own operations has no statistics: use the engine numpy")
    operands = [anchor, *(operand for term in terms for operand in (term.plus, term.minus))]
    work = torch.float64 if any(operand.dtype == "F64" for operand in operands) else torch.float32
    for start in range(0, anchor.elements, EAGER_ELEMENTS):
        run = slice(start, start + EAGER_ELEMENTS)
        o = _wide(anchor, run, work)
        results = [o] * len(outputs)
        for coefficients, plus, minus in terms:
            x = o if plus is anchor else _wide(plus, run, work)
            d = torch.sub(x, _wide(minus, run, work))
            # torch.add(r, d, alpha=c) would fuse the product and the sum into one rounding.
            results = [torch.add(r, torch.mul(d, c)) for r, c in zip(results, coefficients, strict=True)]
        for r, output in zip(results, outputs, strict=True):
            output.view(-1)[run].copy_(_narrow(r, output.dtype))
    return None


def _wide(operand: Operand, run: slice, work: torch.dtype) -> torch.Tensor:
    """Return the elements `run` of an operand in `work`, the dtype of the arithmetic, which is exact."""
    elements: torch.Tensor = operand.memory.view(-1)[run]
    return elements.to(work)


def _narrow(r: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return r rounded once to a dtype."""
    if r.dtype is torch.float64 and dtype in (torch.bfloat16, torch.float16):
        r = _round_to_odd(r)  # torch narrows fp64 to 16 bits through fp32, which would round twice
    return r.to(dtype)


def _round_to_odd(r: torch.Tensor) -> torch.Tensor:
    """Round fp64 to fp32 as `numerics.round_to_odd` does."""
    near = r.to(torch.float32)
    exact = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits -= (exact.abs() > r.abs()).to(torch.int32)
    bits |= ((exact != r) & ~r.isnan()).to(torch.int32)
    return near
