"""What a comparison finds: parts of a model and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .places import Place

if TYPE_CHECKING:
    from .distance import Sums


@dataclass(frozen=True)
class Part:
    """How far sft and aligned are apart in a tensor, a layer, one kind of module of a layer, or all of the model.

    stack: what numbers the layers, "model.layers" say; layer: the number; "" and None outside of layers. kind: the
    module's name without numbers, "self_attn.q_proj" say, weight and bias together; "norms" for all norms; outside of
    layers "embeddings", "head", "norms" or "other"; "" for whole layers. Norms are 2-norms over the elements whose
    difference is finite; NaN where there is none. changed: elements whose values differ. non_finite_*: inf and NaN.
    """

    name: str
    stack: str
    layer: int | None
    kind: str
    elements: int
    sft_norm: float
    aligned_norm: float
    difference_norm: float
    relative_norm: float
    cosine: float
    one_minus_cosine: float
    changed: int
    changed_share: float
    max_abs_difference: float
    non_finite_sft: int
    non_finite_aligned: int


@dataclass(frozen=True)
class Tensor(Part):
    """One tensor, under aligned's name; shape and dtype are aligned's. note: what is not plain about its twin."""

    shape: tuple[int, ...]
    dtype: str
    sft_dtype: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """What training changed. sft, aligned: their names.

    tensors: all that were compared, in aligned's order. layers: each layer, then each kind outside of layers. cells:
    each kind of each layer. totals: all of it. unpaired: (tensor of one model alone, reason). not_compared: (tensor
    or rows of it, reason) of the others that were left out. bytes_read: of both inputs.
    """

    sft: str
    aligned: str
    tensors: tuple[Tensor, ...]
    layers: tuple[Part, ...]
    cells: tuple[Part, ...]
    totals: Part
    unpaired: tuple[tuple[str, str], ...]
    not_compared: tuple[tuple[str, str], ...]
    bytes_read: int
    warnings: tuple[str, ...]


def part_of(name: str, where: Place, sums: Sums) -> Part:
    """Of sums over its elements."""
    d, s, a = (math.sqrt(square) for square in sums[1:4])
    apart = _one_minus_cosine(d, s, a, 2 * sums.d_aligned - sums.d_squared)
    return Part(
        name=name, stack=where.stack, layer=where.layer, kind=where.kind, elements=sums.elements,
        sft_norm=s, aligned_norm=a, difference_norm=d, relative_norm=ratio(d, a), cosine=1.0 - apart,
        one_minus_cosine=apart, changed=sums.changed, changed_share=sums.changed / max(sums.elements, 1),
        max_abs_difference=sums.max_abs_d, non_finite_sft=sums.sft_bad, non_finite_aligned=sums.aligned_bad,
    )  # fmt: skip


def pooled(parts: Sequence[Part]) -> float | None:
    """The relative norm of several parts together, None of none."""
    d, a = (math.hypot(*norms) for norms in ([p.difference_norm for p in parts], [p.aligned_norm for p in parts]))
    return ratio(d, a) if parts else None


def ratio(x: float, y: float) -> float:
    """x / y; 0 / 0 is 0: nothing moved."""
    return x / y if y else math.inf if x else 0.0


def _one_minus_cosine(d: float, s: float, a: float, excess: float) -> float:
    """From the norms of aligned - sft, sft and aligned, and |aligned|^2 - |sft|^2 without cancellation."""
    if not d:
        return 0.0
    if not s or not a or not math.isfinite(d + s + a):
        return math.nan
    longer = excess / (a + s)
    return min(max((d - longer) * (d + longer) / (2 * a * s), 0.0), 2.0)
