"""The compiled CPU engine: `_cpu.c`, on machines where it was built; F64 tensors are left to NumPy.

The engine gives the bits of `numerics.py` at the speed of memcpy in any floating-point mode of the thread, and releases
the GIL. Bytes moved: one read of each input and one write for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dtypes import ITEMSIZE
from . import _cpu
from .contract import CODES, QUANTIZED, Address, Operand, Scales, Statistics, Term, extrapolation_term

NUMBERS = CODES | QUANTIZED  # of the dtypes, in `_cpu.c`


def variants() -> list[str]:
    """Return the names of the variants of the compiled code that this processor has, the best one first."""
    return _cpu.variants()


def extrapolate(
    anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool, variant: str | None = None
) -> Statistics | None:
    """Compute the term of ExPO as `numerics.extrapolate` does, with a variant of `variants()` or the best one.

    Raises:
        EngineError: The arguments are not those of ExPO.
        ValueError: A memory has fewer elements than the anchor, or the processor does not have the variant.
    """
    alphas, _, sft = extrapolation_term("cpu", anchor, terms)
    if "F64" in (sft.dtype, anchor.dtype):
        from . import numerics

        return numerics.extrapolate(anchor, terms, outputs, measure)
    n = anchor.elements
    size = n * ITEMSIZE[anchor.value_dtype]
    statistics = _cpu.extrapolate(
        _memory(sft.memory, n * sft.itemsize),
        NUMBERS[sft.dtype],
        _memory(anchor.memory, n * anchor.itemsize),
        NUMBERS[anchor.dtype],
        n,
        tuple([_memory(output, size) for output in outputs]),
        tuple(alphas),
        measure,
        variant,
        scale_arguments(sft.scales, n),
        scale_arguments(anchor.scales, n),
    )
    return Statistics(*statistics) if statistics else None


def scale_arguments(scales: Scales | None, n: int) -> tuple[Any, ...] | None:
    """Return the scales of n elements in the form that `_cpu.c` takes. Raises ValueError if they do not cover them."""
    if scales is None:
        return None
    scales.check(n)
    return scales.values, *scales.values.shape, scales.width, *scales.block, scales.first


def _memory(memory: Any, needed: int) -> Any:
    """Return a memory in the form that `_cpu.c` takes: a buffer, whose size `_cpu.c` checks, or a bare address.

    Raises:
        ValueError: The memory at an address has fewer bytes than `needed`.
    """
    if type(memory) is not Address:
        return memory
    if memory.nbytes < needed:
        raise ValueError(f"buffer of {memory.nbytes} bytes where {needed} are needed")
    return memory.start
