from typing import Any

def variants() -> list[str]: ...
def extrapolate(
    sft: Any,
    sft_dtype: int,
    aligned: Any,
    aligned_dtype: int,
    n: int,
    outs: tuple[Any, ...],
    alphas: tuple[float, ...],
    measure: bool,
    variant: str | None = None,
    sft_scales: tuple[Any, ...] | None = None,
    aligned_scales: tuple[Any, ...] | None = None,
) -> tuple[float, float, float, tuple[tuple[int, int], ...]] | None: ...
def cast(
    source: Any, source_dtype: int, out: Any, out_dtype: int, n: int, before: Any, variant: str | None = None
) -> tuple[int, int] | None: ...
def dequantize(
    elements: Any, dtype: int, n: int, scales: tuple[Any, ...], out: Any, variant: str | None = None
) -> None: ...
def low_rank(
    left: Any,
    right: Any,
    scale: float,
    rows: int,
    rank: int,
    width: int,
    first: int,
    n: int,
    out: Any,
    variant: str | None = None,
) -> None: ...
