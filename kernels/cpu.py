"""The compiled CPU engine: `_cpu.c`, on machines where it was built; F64 tensors are left to NumPy.

The engine gives the bits of `numerics.py` at the speed of memcpy in any floating-point mode of the thread, and releases
the GIL. Bytes moved: one read of each input and one write for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dtypes import ITEMSIZE
from . import _cpu
from .contract import CODES, Address, Operand, Statistics, Term, extrapolation_term


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
    size = n * ITEMSIZE[anchor.dtype]
    statistics = _cpu.extrapolate(
        _memory(sft.memory, n * ITEMSIZE[sft.dtype]),
        CODES[sft.dtype],
        _memory(anchor.memory, size),
        CODES[anchor.dtype],
        n,
        tuple([_memory(output, size) for output in outputs]),
        tuple(alphas),
        measure,
        variant,
    )
    return Statistics(*statistics) if statistics else None


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
