"""The result of a comparison: parts of a model, and how far sft and aligned are apart in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .places import Place

if TYPE_CHECKING:
    from .distance import DistanceSums


@dataclass(frozen=True)
class Part:
    """The distance between sft and aligned in a tensor, in a layer, in one kind of module of a layer, or in all.

    Norms are 2-norms over the elements whose difference is finite; they are 0 if no element's difference is.

    Attributes:
        name: The name of the tensor or of the place.
        stack: The name of the modules that number the layers, such as "model.layers"; "" outside of layers.
        layer: The number of the layer; None outside of layers.
        kind: The name of the module without numbers, such as "self_attn.q_proj", weight and bias together; "norms" for
            all norms; outside of layers "embeddings", "head", "norms" or "other"; "" for a whole layer.
        elements: The number of elements.
        sft_norm: |sft|.
        aligned_norm: |aligned|.
        difference_norm: |aligned - sft|.
        relative_norm: |aligned - sft| / |aligned|.
        cosine: The cosine similarity of sft and aligned.
        one_minus_cosine: 1 - cosine, without the rounding error of that subtraction.
        changed: The number of elements whose values differ.
        changed_share: The share of the elements whose values differ, from 0 to 1.
        max_abs_difference: The largest absolute difference of an element.
        non_finite_sft: The number of elements of sft that are inf or NaN.
        non_finite_aligned: The number of elements of aligned that are inf or NaN.
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
    """One tensor, under its name in aligned.

    Attributes:
        shape: The shape in aligned; if only some rows are compared, the shape of these rows.
        dtype: The dtype in aligned.
        sft_dtype: The dtype in sft.
        note: Words about the rows that were compared and about the counterpart; "" if nothing is special.
    """

    shape: tuple[int, ...]
    dtype: str
    sft_dtype: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """The changes of a training.

    Attributes:
        sft: The name of the sft checkpoint.
        aligned: The name of the aligned checkpoint.
        tensors: All tensors that were compared, in aligned's order.
        layers: Each layer, then each kind outside of layers.
        cells: Each kind of each layer.
        totals: The whole model.
        unpaired: (tensor, reason) of the tensors that one checkpoint alone has.
        not_compared: (tensor or rows of it, reason) of all others that were not compared.
        bytes_read: The bytes read from both inputs.
        warnings: Sentences about the pair.
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


def make_part(name: str, place: Place, sums: DistanceSums) -> Part:
    """Return the part of a model with these sums over its elements."""
    d, s, a = (math.sqrt(square) for square in (sums.d_squared, sums.sft_squared, sums.aligned_squared))
    one_minus_cosine = _one_minus_cosine(d, s, a, 2 * sums.d_aligned - sums.d_squared)
    return Part(
        name=name, stack=place.stack, layer=place.layer, kind=place.kind, elements=sums.elements,
        sft_norm=s, aligned_norm=a, difference_norm=d, relative_norm=_ratio(d, a), cosine=1.0 - one_minus_cosine,
        one_minus_cosine=one_minus_cosine, changed=sums.changed, changed_share=sums.changed / max(sums.elements, 1),
        max_abs_difference=sums.max_abs_d, non_finite_sft=sums.sft_non_finite,
        non_finite_aligned=sums.aligned_non_finite,
    )  # fmt: skip


def pool_relative_norm(parts: Sequence[Part]) -> float | None:
    """Return the relative norm of several parts together; None for no parts."""
    d, a = (math.hypot(*norms) for norms in ([p.difference_norm for p in parts], [p.aligned_norm for p in parts]))
    return _ratio(d, a) if parts else None


def _ratio(x: float, y: float) -> float:
    """Return x / y; 0 / 0 is 0, because nothing changed."""
    return x / y if y else math.inf if x else 0.0


def _one_minus_cosine(d: float, s: float, a: float, excess: float) -> float:
    """Return 1 - cosine without cancellation; comparison.py has the formula.

    Args:
        d: |aligned - sft|.
        s: |sft|.
        a: |aligned|.
        excess: |aligned|^2 - |sft|^2, computed without cancellation.
    """
    if not d:
        return 0.0
    if not s or not a or not math.isfinite(d + s + a):
        return math.nan
    longer = excess / (a + s)
    return min(max((d - longer) * (d + longer) / (2 * a * s), 0.0), 2.0)
