from typing import Any

def extrapolate(
    sft: Any,
    sft_dtype: int,
    aligned: Any,
    aligned_dtype: int,
    n: int,
    outs: tuple[Any, ...],
    alphas: tuple[float, ...],
    measure: bool,
) -> tuple[float, float, float, tuple[tuple[int, int], ...]] | None: ...
