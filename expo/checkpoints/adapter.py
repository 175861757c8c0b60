"""A LoRA adapter as its header describes it: the changes that turn its base into the trained checkpoint.

An adapter may lie over another adapter: the later one was then trained on the model that the earlier one makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .safetensors_header import TensorInfo
    from .shard import Shard


class FactorPart(NamedTuple):
    """The part of two factors that belongs to one tensor of one expert; see `lora_experts`.

    Attributes:
        experts: The number of experts that the factors have.
        expert: The number of the expert.
        start: The first row of the left factor.
        stop: The row after the last.
    """

    experts: int
    expert: int
    start: int
    stop: int


class LowRank(NamedTuple):
    """The delta of a base tensor [M, N]: scale * left @ right, where left is [M, r] and right is [r, N].

    Attributes:
        left: The left factor as it is stored.
        right: The right factor as it is stored.
        left_transposed: True if the left factor is stored as [r, M].
        right_transposed: True if the right factor is stored as [N, r].
        scale: The number that the product is multiplied by.
        path: Path of the file with both factors.
        part: The part of the factors that counts; None for both factors as they are.
        blocks: The first row and the delta of each run of rows that has factors of its own; `left` and `right` are then
            those of the first run. () for a delta with one pair of factors.
        rows: M, if there are such runs.
    """

    left: TensorInfo
    right: TensorInfo
    left_transposed: bool
    right_transposed: bool
    scale: float
    path: str
    part: FactorPart | None = None
    blocks: tuple[tuple[int, LowRank], ...] = ()
    rows: int = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of both factors as they are stored, or of the part that counts."""
        if self.blocks:
            return sum(delta.nbytes for _, delta in self.blocks)
        if self.part is None:
            return self.left.nbytes + self.right.nbytes
        rows = self.part.stop - self.part.start
        left = self.left.nbytes * rows // self.left.shape[0]
        return (left + self.right.nbytes) // self.part.experts

    @property
    def rank(self) -> int:
        """Return r, the length of the dimension that both factors share."""
        if self.blocks:
            return sum(delta.rank for _, delta in self.blocks)
        both = self.left.shape[0 if self.left_transposed else 1]
        return both if self.part is None else both // self.part.experts


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter over its base.

    The trained checkpoint has the tensors of `full` in place of the base's, and base + delta for those of `low_rank`.
    No name is both in low_rank and in full.

    Attributes:
        path: Path of the adapter's folder.
        config: The object in adapter_config.json.
        shard: The file with the weights. Every TensorInfo here has the name that the tensor has in this file.
        low_rank: The deltas, by the base's name for the tensor.
        full: The tensors that were trained as a whole, by the base's name for the tensor.
        base_dtypes: The dtypes that the base has for the tensors of `full`, by the base's name.
        copies: The base's tensors that the adapter repeats beside a delta, by the base's name; see `check_copies`.
        unties: True if the head and the embedding of the trained model are two tensors, and those of its base are one.
        note: A sentence for the user about the untied head; None if the adapter unties nothing.
    """

    path: str
    config: dict[str, Any]
    shard: Shard
    low_rank: dict[str, LowRank]
    full: dict[str, TensorInfo]
    copies: dict[str, TensorInfo] = field(default_factory=dict)
    base_dtypes: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    note: str | None = None


def find_whole(adapters: Sequence[Adapter], name: str) -> Adapter | None:
    """Return the last of these adapters that has a tensor of the base as a whole; None if none of them has it."""
    return next((adapter for adapter in reversed(adapters) if name in adapter.full), None)


def find_deltas(adapters: Sequence[Adapter], name: str) -> tuple[LowRank, ...]:
    """Return the deltas that these adapters add to a tensor, in their order; a whole tensor replaces earlier deltas."""
    found: tuple[LowRank, ...] = ()
    for adapter in adapters:
        found = () if name in adapter.full else found
        found += (adapter.low_rank[name],) if name in adapter.low_rank else ()
    return found
