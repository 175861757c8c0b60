"""What happens to a tensor of the output, or to a run of its rows. Pure.

A step has aligned's name and shape and the output's dtype. It reads its bytes of aligned, and of sft unless it copies:

    EXTRAPOLATE   out = aligned + alpha * (aligned - sft)
    COPY          out = aligned
    with an adapter's delta, where aligned is the base that both were made from:
    EXTRAPOLATE   out = aligned + (1 + alpha) * delta,  COPY  out = aligned + delta
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import BITS

if TYPE_CHECKING:
    from ..checkpoints.lora import LowRank


class Action(str, Enum):
    """What happens to a tensor of aligned."""

    EXTRAPOLATE = "extrapolate"
    COPY = "copy"


class Step(NamedTuple):
    """A tensor of the output, or rows of one, with aligned's name and shape.

    reason: why, in words; of an EXTRAPOLATE "", or what is not plain about it. alphas: one for each output; an alpha
    that is 0 in the tensor's arithmetic is a copy there. aligned: whose bytes are read, those of the rows alone. sft:
    its twin, None where the action is COPY. dtype: the output's. rows: the first and the one past the last, None for
    all. delta: of an adapter.
    """

    name: str
    action: Action
    reason: str
    alphas: tuple[float, ...]
    aligned: TensorInfo
    sft: TensorInfo | None
    dtype: str
    rows: tuple[int, int] | None = None
    delta: LowRank | None = None

    @property
    def active(self) -> list[int]:
        """The numbers of the outputs for which it is not a copy."""
        return [k for k, alpha in enumerate(self.alphas) if alpha]

    @property
    def counted(self) -> list[int]:
        """The numbers of the outputs whose changed and non-finite elements are counted: a conversion can overflow."""
        return self.active if self.plain else list(range(len(self.alphas)))

    @property
    def plain(self) -> bool:
        """Whether an engine's result, or aligned's bytes, are the output as they are."""
        return self.delta is None and self.dtype == self.aligned.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aligned.shape

    @property
    def nbytes(self) -> int:
        """Bytes of output, for one alpha."""
        return element_count(self.shape) * BITS[self.dtype] // 8

    @property
    def input_bytes(self) -> int:
        """Bytes read for it, each once."""
        if self.delta is not None:
            return self.aligned.nbytes + self.delta.nbytes
        return self.aligned.nbytes + (self.sft.nbytes if self.sft else 0)

    @property
    def label(self) -> str:
        """The name, with the rows where it is not all of them: `lm_head.weight[32000:32002]`."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def some_rows(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of a tensor, which lie together."""
    row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    shape = (stop - start, *tensor.shape[1:])
    return TensorInfo(tensor.name, tensor.dtype, shape, tensor.start + start * row, tensor.start + stop * row)
