"""Calls of engines with the term of ExPO, for tests that have the bytes of sft and of aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expo.kernels.contract import EngineFunction, Operand, Statistics, extrapolation


def run_engine(
    engine: EngineFunction,
    sft: Any,
    aligned: Any,
    pair: tuple[str, str],
    outputs: Sequence[Any],
    alphas: Sequence[float],
    measure: bool = False,
) -> Statistics | None:
    """Fill an output for each alpha; `pair` has the dtypes of sft and of aligned, and the alphas are working alphas."""
    arguments = extrapolation(Operand(sft, pair[0]), Operand(aligned, pair[1]), alphas)
    return engine(*arguments, outputs, measure)
