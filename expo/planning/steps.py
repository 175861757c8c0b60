"""A step: what happens to one tensor of the output, or to a run of its rows. Pure.

A step has aligned's name and shape and the output's dtype. It reads its bytes of aligned, and of sft unless it copies:

    EXTRAPOLATE   out = aligned + alpha * (aligned - sft)
    COPY          out = aligned

With an adapter's delta, aligned stands for the base that both models were made from:

    EXTRAPOLATE   out = base + (1 + alpha) * delta
    COPY          out = base + delta
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import BITS
from ..kernels.contract import working_alpha

if TYPE_CHECKING:
    from ..checkpoints.adapter import LowRank

# Why a tensor is copied or dropped.
NOT_IN_SFT, ONLY_IN_SFT, UNTOUCHED, SFT_HAS = "not in sft", "only in sft", "not in the adapter", "sft has "


class Action(str, Enum):
    """What happens to a tensor of aligned."""

    EXTRAPOLATE = "extrapolate"
    COPY = "copy"


class Step(NamedTuple):
    """One tensor of the output, or a run of its rows, with aligned's name and shape.

    Attributes:
        name: The tensor's name in aligned and in the output.
        action: What happens to it.
        reason: Why it is copied; for an EXTRAPOLATE what a reader should know of it, "" where nothing is special.
        aligned: The tensor whose bytes are read; for some rows, those bytes alone.
        sft: Its counterpart; None where the action is COPY.
        dtype: The safetensors name of the output's dtype.
        own_alpha: The alpha that `alpha_for` gives this tensor in every output; None where the output's alpha counts.
        alphas: One alpha for each output, 0 where the tensor is a copy there; empty before `at` has set them.
        rows: The first row and the one past the last; None for the whole tensor.
        delta: The adapter's product of two matrices; None without one.
    """

    name: str
    action: Action
    reason: str
    aligned: TensorInfo
    sft: TensorInfo | None
    dtype: str
    own_alpha: float | None = None
    alphas: tuple[float, ...] = ()
    rows: tuple[int, int] | None = None
    delta: LowRank | None = None

    def at(self, alphas: Sequence[float]) -> Step:
        """Return the step of outputs with these alphas; it is a copy where each alpha is 0 in the tensor's dtypes."""
        if self.sft is None:
            return self._replace(alphas=(0.0,) * len(alphas))
        asked = alphas if self.own_alpha is None else [self.own_alpha] * len(alphas)
        dtypes = self.aligned.dtype, self.sft.dtype
        working = tuple(alpha if working_alpha(alpha, *dtypes) else 0.0 for alpha in asked)
        if any(working):
            return self._replace(alphas=working)
        reason = why_zero(rounded=any(asked), adapted=self.delta is not None)
        return self._replace(action=Action.COPY, reason=reason, sft=None, alphas=working)

    @property
    def active(self) -> list[int]:
        """The numbers of the outputs for which the step is not a copy."""
        return [k for k, alpha in enumerate(self.alphas) if alpha]

    @property
    def counted(self) -> list[int]:
        """The numbers of the outputs whose changed and non-finite elements are counted; a conversion may overflow."""
        return self.active if self.plain else list(range(len(self.alphas)))

    @property
    def plain(self) -> bool:
        """True if an engine's result, or aligned's bytes, are the output without a conversion."""
        return self.delta is None and self.dtype == self.aligned.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aligned.shape

    @property
    def nbytes(self) -> int:
        """Bytes of one output."""
        return element_count(self.shape) * BITS[self.dtype] // 8

    @property
    def input_bytes(self) -> int:
        """Bytes that are read for the step, each once."""
        if self.delta is not None:
            return self.aligned.nbytes + self.delta.nbytes
        return self.aligned.nbytes + (self.sft.nbytes if self.sft else 0)

    @property
    def label(self) -> str:
        """The name, with the rows where the step has some of them: `lm_head.weight[32000:32002]`."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def why_zero(rounded: bool = False, adapted: bool = False) -> str:
    """Return the reason of a copy whose alphas are 0, or are rounded to 0; adapted: base and adapter are added."""
    return ("alpha rounds to 0 in fp32" if rounded else "alpha is 0") + ": base and adapter" * adapted


def some_rows(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Return rows [start, stop) of a tensor, whose bytes lie together."""
    row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    shape = (stop - start, *tensor.shape[1:])
    return TensorInfo(tensor.name, tensor.dtype, shape, tensor.start + start * row, tensor.start + stop * row)


def joined(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of parts that follow one another along the first dimension."""
    return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def by_tensor(steps: Iterable[Step]) -> Iterator[tuple[TensorInfo, list[Step]]]:
    """Yield each tensor of the output, as if it began at byte 0, and the steps that make it, in aligned's order."""
    for name, group in itertools.groupby(steps, key=lambda step: step.name):
        own = list(group)
        shape = joined([step.shape for step in own])
        yield TensorInfo(name, own[0].dtype, shape, 0, sum(step.nbytes for step in own)), own
