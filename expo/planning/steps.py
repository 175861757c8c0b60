"""Describe a step: the action that makes one tensor of the output, or a run of its rows.

A step has aligned's name and shape and the output's dtype. It reads bytes of aligned; an EXTRAPOLATE step reads the
counterpart's bytes of sft too:

    EXTRAPOLATE   out = aligned + alpha * (aligned - sft)
    COPY          out = aligned

If aligned is an adapter, its delta changes the base, and the formulas are:

    EXTRAPOLATE   out = base + (1 + alpha) * delta
    COPY          out = base + delta

If both are adapters over one base, sft's delta changes the base, and the formulas are:

    EXTRAPOLATE   out = base + delta_sft + (1 + alpha) * (delta_aligned - delta_sft)
    COPY          out = base + delta_aligned
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

# The reasons why a tensor is copied or dropped. SFT_HAS is the start of a reason: the dtype and shape in sft follow it.
NOT_IN_SFT, ONLY_IN_SFT, UNTOUCHED, SFT_HAS = "not in sft", "only in sft", "not in the adapter", "sft has "


class Action(str, Enum):
    """The action that makes an output tensor from a tensor of aligned."""

    EXTRAPOLATE = "extrapolate"
    COPY = "copy"


class Deltas(NamedTuple):
    """The products by which adapters change a tensor.

    Attributes:
        aligned: The deltas that are added to the tensor of aligned, in their order.
        sft: The deltas that are added to the tensor of sft, in their order.
        share_base: True if the tensors of aligned and sft, to which the deltas are added, are one tensor of the base.
    """

    aligned: tuple[LowRank, ...] = ()
    sft: tuple[LowRank, ...] = ()
    share_base: bool = True


class Step(NamedTuple):
    """One tensor of the output, or a run of its rows, with aligned's name and shape.

    Attributes:
        name: The tensor's name in aligned and in the output.
        action: The action that makes the tensor or the rows.
        reason: The reason for a copy; for an extrapolation a remark for the user, or "".
        aligned: The tensor of aligned, or its rows, whose bytes the step reads.
        sft: The counterpart, or its rows; None if the action is COPY.
        dtype: The safetensors name of the output's dtype.
        own_alpha: The alpha that `alpha_for` gives this tensor in every output; None if each output's alpha applies.
        alphas: One alpha for each output, 0 if the step is a copy in that output; empty until `with_alphas` sets
            them.
        rows: The first row, and the row after the last; None for the whole tensor.
        deltas: The products by which adapters change the tensor; None if no adapter does.
        whole: The shape of the tensor, if the step is a run of its elements and not of its rows; else None.
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
    deltas: Deltas | None = None
    whole: tuple[int, ...] | None = None

    def with_alphas(self, alphas: Sequence[float]) -> Step:
        """Return the step with one alpha for each output; a copy if every alpha is 0 in the step's arithmetic."""
        if self.sft is None:
            return self._replace(alphas=(0.0,) * len(alphas))
        chosen = alphas if self.own_alpha is None else [self.own_alpha] * len(alphas)
        dtypes = self.aligned.dtype, self.sft.dtype
        working = tuple(alpha if working_alpha(alpha, *dtypes) else 0.0 for alpha in chosen)
        if any(working):
            return self._replace(alphas=working)
        reason = why_zero(rounded=any(chosen), adapted=bool(self.deltas))
        return self._replace(action=Action.COPY, reason=reason, sft=None, alphas=working)

    @property
    def active(self) -> list[int]:
        """The numbers of the outputs in which the step is not a copy."""
        return [k for k, alpha in enumerate(self.alphas) if alpha]

    @property
    def counted(self) -> list[int]:
        """The numbers of the outputs whose changed and non-finite elements are counted.

        A copy in another dtype is counted too, because a conversion may overflow.
        """
        return self.active if self.plain else list(range(len(self.alphas)))

    @property
    def plain(self) -> bool:
        """True if the step needs no conversion: an engine or a copy of aligned's bytes makes the output directly."""
        return self.deltas is None and self.dtype == self.aligned.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aligned.shape

    @property
    def nbytes(self) -> int:
        """The number of bytes of this step in one output."""
        return element_count(self.shape) * BITS[self.dtype] // 8

    @property
    def input_bytes(self) -> int:
        """The number of bytes of both inputs that the step reads."""
        other = self.sft.nbytes if self.sft and not self.shares_base else 0
        return self.aligned.nbytes + other + sum(delta.nbytes for delta in self.all_deltas)

    @property
    def shares_base(self) -> bool:
        """True if adapters change one tensor of the base, which is read once."""
        return self.deltas is not None and self.deltas.share_base

    @property
    def all_deltas(self) -> tuple[LowRank, ...]:
        """The deltas that the step reads, each once."""
        if self.deltas is None:
            return ()
        return tuple(dict.fromkeys((*self.deltas.aligned, *(self.deltas.sft if self.sft else ()))))

    @property
    def first_element(self) -> int:
        """The number of the step's first element in its tensor, in which a delta counts its elements."""
        return 0 if self.rows is None else self.rows[0] * element_count(self.shape[1:])

    @property
    def label(self) -> str:
        """The tensor's name, with the rows if the step has only some of them: `lm_head.weight[32000:32002]`."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def why_zero(rounded: bool = False, adapted: bool = False) -> str:
    """Return the reason for a copy whose alphas are 0.

    Args:
        rounded: True if an alpha is 0 only after it is rounded to fp32.
        adapted: True if the copy is the sum of the base and an adapter's delta.
    """
    return ("alpha rounds to 0 in fp32" if rounded else "alpha is 0") + ": base and adapter" * adapted


def some_rows(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Return rows [start, stop) of a tensor, which are one range of bytes in its file."""
    row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    shape = (stop - start, *tensor.shape[1:])
    return TensorInfo(tensor.name, tensor.dtype, shape, tensor.start + start * row, tensor.start + stop * row)


def join_shapes(steps: Sequence[Step]) -> tuple[int, ...]:
    """Return the shape of the tensor that these steps make: the steps of several rows are joined along them."""
    first = steps[0]
    if first.whole is not None or len(steps) == 1:
        return first.whole or first.shape
    return (sum(step.shape[0] for step in steps), *first.shape[1:])


def cut_steps(steps: Iterable[Step], size: int) -> Iterator[tuple[Step, int, int, int]]:
    """Yield (step, start, stop, at) for the parts of all steps, each of at most `size` bytes of the step's output.

    The bytes [start, stop) are counted from the first byte of the step's output. The number `at` is the part's first
    byte in memory that has the outputs of all steps one after the other.
    """
    before = 0
    for step in steps:
        for start in range(0, step.nbytes, size):
            yield step, start, min(start + size, step.nbytes), before + start
        before += step.nbytes


def by_tensor(steps: Iterable[Step]) -> Iterator[tuple[TensorInfo, list[Step]]]:
    """Yield each tensor of the output, in aligned's order, and the steps that make it.

    The steps of one tensor must follow each other. The `start` of each tensor is 0, because it lies in no file yet.
    """
    for name, group in itertools.groupby(steps, key=lambda step: step.name):
        own = list(group)
        yield TensorInfo(name, own[0].dtype, join_shapes(own), 0, sum(step.nbytes for step in own)), own
