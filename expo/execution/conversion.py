"""The conversion of elements whose output has another dtype than aligned, or which have the delta of an adapter.

The arithmetic is fp32, and the result is rounded once to the output's dtype. Without a delta, the engine extrapolates
from aligned in fp32. With a delta,

    out = round(f32(base) + f32(1 + alpha) * delta),   aligned = f32(base) + delta

which is the formula of ExPO with aligned - sft = delta. If a tensor is F64, the arithmetic is fp64; only delta itself
is still computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels import convert
from ..kernels.contract import Operand, Statistics, extrapolation, working_alpha
from ..kernels.numerics import STORAGE, Array, widen
from ..planning.steps import Step
from .engines import Engine

Factors = tuple[Array, Array, float]  # an adapter's matrices of shapes [M, r] and [r, N] in fp32, and their scale


def factor_in_fp32(factor: Array, dtype: str) -> Array:
    """Return a factor, an array of the safetensors dtype `dtype`, as C-contiguous fp32."""
    return np.ascontiguousarray(widen(factor.view(STORAGE[dtype]), dtype), np.float32)


class Conversion:
    """The conversion of elements [first, first + n) of a step's output."""

    def __init__(self, step: Step, first: int, n: int, inputs: Sequence[Operand], factors: Factors | None) -> None:
        """Compute aligned in the dtype of the arithmetic, fp32 or fp64.

        Args:
            step: The step.
            first: The number of the first element, counted from the first element of the step's output.
            n: The number of elements.
            inputs: The elements of aligned and of sft; of aligned alone for a copy; of the base alone with a delta.
            factors: The adapter's matrices and their scale; None without a delta.
        """
        self._step = step
        self._n = n
        self._sft = inputs[-1]
        dtypes = [step.aligned.dtype, *([step.sft.dtype] if step.sft else [])]
        self._arithmetic = "F64" if "F64" in dtypes else "F32"
        self._base = np.empty(n, STORAGE[self._arithmetic])
        if inputs[0].scales is None:
            convert.cast(inputs[0].memory, inputs[0].dtype, self._base, self._arithmetic, n)
        else:
            values = self._base if self._arithmetic == "F32" else np.empty(n, np.float32)
            convert.dequantize(inputs[0], values)
            self._base[...] = values
        self._delta: Array | None = None
        self._aligned = self._base
        if factors is not None:
            self._delta = np.empty(n, np.float32)
            convert.low_rank(*factors, first, self._delta)
            self._aligned = np.empty_like(self._base)
            convert.add_delta(self._base, self._delta, 1.0, self._aligned)

    def _round_aligned(self) -> Array:
        """Return aligned rounded to the output's dtype and widened again, with which outputs are compared."""
        out = np.empty(self._n, STORAGE[self._step.dtype])
        convert.cast(self._aligned, self._arithmetic, out, self._step.dtype, self._n)
        back = np.empty_like(self._aligned)
        convert.cast(out, self._step.dtype, back, self._arithmetic, self._n)
        return back

    def compute(self, engine: Engine, outs: Sequence[Any], measure: bool) -> Statistics | None:
        """Fill one output for each alpha.

        Returns:
            The statistics if `measure`, else None.

        Raises:
            RuntimeError: The engine failed.
        """
        step, counts, sums = self._step, [], Statistics(0.0, 0.0, 0.0, ())
        before = self._round_aligned() if measure else None
        result = np.empty_like(self._aligned)
        for k, out in enumerate(outs):
            alpha = step.alphas[k]
            if not alpha:
                counted = convert.cast(self._aligned, self._arithmetic, out, step.dtype, self._n, before)
                counts.append(counted and (0, counted[1]))  # a copy changes nothing, but NaN compares as changed
                continue
            assert step.sft is not None
            # If there is a delta, only the sums need the engine, and they are the same for every alpha.
            if self._delta is None or (measure and not sums.aligned_squared):
                aligned = Operand(self._aligned, self._arithmetic)
                sums = engine.run(*extrapolation(self._sft, aligned, (alpha,)), [result], measure) or sums
            if self._delta is not None:
                beta = working_alpha(1.0 + alpha, self._arithmetic)
                convert.add_delta(self._base, self._delta, beta, result)
            counts.append(convert.cast(result, self._arithmetic, out, step.dtype, self._n, before))
        return sums._replace(counts=tuple(each for each in counts if each)) if measure else None
