"""The conversion of elements whose output has another dtype than aligned, or to which adapters add deltas.

The arithmetic is fp32, and the result is rounded once to the output's dtype. Without a delta, the engine extrapolates
from aligned in fp32. If adapters add deltas to one tensor of the base,

    out = round(sft + f32(1 + alpha) * d),   sft = f32(base) + delta_sft,   aligned = f32(base) + delta_aligned
    d = delta_aligned - delta_sft

which is the formula of ExPO with aligned - sft = d. Without an adapter of its own, sft is the base and d is
delta_aligned. If aligned's adapter was trained on the model that sft's adapter makes, aligned is sft + d, and d is the
delta of aligned's adapter. If the deltas are added to two tensors, because an adapter has a whole tensor of its own,
the engine extrapolates from the two sums. If a tensor is F64, the arithmetic is fp64; only deltas and d are still
computed in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels import convert
from ..kernels.contract import Operand, Statistics, extrapolation, working_alpha
from ..kernels.numerics import STORAGE, Array, widen
from ..planning.steps import Step
from .engines import Engine

if TYPE_CHECKING:
    from ..checkpoints.adapter import LowRank

Factors = tuple[Array, Array, float]  # an adapter's matrices of shapes [M, r] and [r, N] in fp32, and their scale


def factor_in_fp32(factor: Array, dtype: str) -> Array:
    """Return a factor, an array of the safetensors dtype `dtype`, as C-contiguous fp32."""
    return np.ascontiguousarray(widen(factor.view(STORAGE[dtype]), dtype), np.float32)


class Conversion:
    """The conversion of elements [first, first + n) of a step's output.

    Attributes:
        arithmetic: The safetensors name of the arithmetic's dtype, F32 or F64.
        aligned: The elements of aligned in that dtype, with the deltas and not rounded.
    """

    def __init__(
        self, step: Step, first: int, n: int, inputs: Sequence[Operand], factors: Mapping[LowRank, Factors]
    ) -> None:
        """Compute aligned in the dtype of the arithmetic.

        Args:
            step: The step.
            first: The number of the first element, counted from the first element of the step's output.
            n: The number of elements.
            inputs: The elements of aligned and of sft; of aligned alone for a copy; of the base alone if deltas share
                it.
            factors: The adapters' matrices and their scales, for each delta of the step.
        """
        self._step, self._n, self._inputs = step, n, inputs
        self._first, self._factors = first + step.first_element, factors
        dtypes = [step.aligned.dtype, *([step.sft.dtype] if step.sft else [])]
        self.arithmetic = "F64" if "F64" in dtypes else "F32"
        self._stored = self._widen(inputs[0])
        self.aligned = self._add(self._stored, step.deltas.aligned if step.deltas else ())

    def sft(self) -> Array:
        """Return the elements of sft, or of aligned for a copy, with the deltas and not rounded."""
        step = self._step
        if step.sft is None:
            return self.aligned
        stored = self._widen(self._inputs[1]) if len(self._inputs) > 1 else self._stored
        return self._add(stored, step.deltas.sft if step.deltas else ())

    def _widen(self, elements: Operand) -> Array:
        """Return elements in the dtype of the arithmetic, which is exact, or the values of quantised ones."""
        wide = np.empty(self._n, STORAGE[self.arithmetic])
        if elements.scales is None:
            convert.cast(elements.memory, elements.dtype, wide, self.arithmetic, self._n)
            return wide
        values = wide if self.arithmetic == "F32" else np.empty(self._n, np.float32)
        convert.dequantize(elements, values)
        wide[...] = values
        return wide

    def _add(self, stored: Array, deltas: Sequence[LowRank]) -> Array:
        """Return the sum of stored elements and deltas, added in their order; the elements themselves without any."""
        for delta in deltas:
            total = np.empty_like(stored)
            convert.add_delta(stored, self._delta(delta), 1.0, total)
            stored = total
        return stored

    def _delta(self, delta: LowRank) -> Array:
        elements = np.empty(self._n, np.float32)
        convert.low_rank(*self._factors[delta], self._first, elements)
        return elements

    def _difference(self) -> Array:
        """Return aligned - sft in fp32 as the difference of deltas; those that both have are left out."""
        assert self._step.deltas is not None
        aligned, sft, _ = self._step.deltas
        both = set(aligned) & set(sft)
        added, removed = ([self._delta(each) for each in side if each not in both] for side in (aligned, sft))
        difference = added[0] if added else np.zeros(self._n, np.float32)
        with np.errstate(all="ignore"):
            for each in added[1:]:
                difference += each
            for each in removed:
                difference -= each
        return difference

    def _sft_operand(self) -> Operand:
        """Return sft as an engine reads it: its own bytes, or the sum with its deltas."""
        step = self._step
        assert step.sft is not None
        if step.deltas is None or not step.deltas.sft:
            return self._inputs[-1]
        return Operand(self.sft(), self.arithmetic)

    def _round_aligned(self) -> Array:
        """Return aligned rounded to the output's dtype and widened again, with which outputs are compared."""
        out = np.empty(self._n, STORAGE[self._step.dtype])
        convert.cast(self.aligned, self.arithmetic, out, self._step.dtype, self._n)
        return self._widen(Operand(out, self._step.dtype))

    def compute(self, engine: Engine, outs: Sequence[Any], measure: bool) -> Statistics | None:
        """Fill one output for each alpha.

        Returns:
            The statistics if `measure`, else None.

        Raises:
            RuntimeError: The engine failed.
        """
        step, counts, sums = self._step, [], Statistics(0.0, 0.0, 0.0, ())
        before = self._round_aligned() if measure else None
        base, difference = None, None
        if step.sft is not None and step.shares_base:
            base, difference = self.sft(), self._difference()
        result = np.empty_like(self.aligned)
        for k, out in enumerate(outs):
            alpha = step.alphas[k]
            if not alpha:
                counted = convert.cast(self.aligned, self.arithmetic, out, step.dtype, self._n, before)
                counts.append(counted and (0, counted[1]))  # a copy changes nothing, but NaN compares as changed
                continue
            # If deltas share a base, only the sums need the engine, and they are the same for every alpha.
            if difference is None or (measure and not sums.aligned_squared):
                operands = self._sft_operand(), Operand(self.aligned, self.arithmetic)
                sums = engine.run(*extrapolation(*operands, (alpha,)), [result], measure) or sums
            if base is not None and difference is not None:
                convert.add_delta(base, difference, working_alpha(1.0 + alpha, self.arithmetic), result)
            counts.append(convert.cast(result, self.arithmetic, out, step.dtype, self._n, before))
        return sums._replace(counts=tuple(each for each in counts if each)) if measure else None
