"""What a merge reports: the result's types, and the tally of how far the weights moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..dtypes import BITS
from ..kernels.contract import Statistics, exact_sum
from ..planning.shards import Chunk
from ..planning.steps import Step

TOO_FAR = 0.5  # |aligned - sft| / |aligned|: below 0.1 for related models, above 1 for unrelated ones


@dataclass(frozen=True)
class Output:
    """One finished output.

    changed: share of the extrapolated elements whose value differs from aligned's in the output's dtype.
    relative_change: the 2-norm of alpha * (aligned - sft) over that of aligned, both over the extrapolated tensors.
    non_finite: inf and NaN that were computed or converted.
    """

    path: str
    alpha: float
    changed: float
    relative_change: float
    non_finite: int


@dataclass(frozen=True)
class Merged:
    """What merge() did: one Output for each alpha, numbers of tensors and bytes, and seconds of wall time.

    copied: (tensor, reason). noted: (tensor, what is not plain about it) of extrapolated ones: sft calls or shapes it
    otherwise. dropped: (tensor of sft alone, reason). left_out: (file of aligned's folder, reason).
    relative_distance: the 2-norm of aligned - sft over that of aligned; max_abs_difference: its largest element.
    engine, why, workers: what computed, the reason it was chosen, its threads. ranks: processes that made it together,
    each with so many workers. shares: bytes of output by engine.
    direct: whether all of it was written with O_DIRECT. verified: whether it was read back and compared.
    checked: whether transformers loaded it. resumed: bytes of output that an interrupted merge had left.
    """

    outputs: tuple[Output, ...]
    extrapolated: int
    copied: tuple[tuple[str, str], ...]
    noted: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    relative_distance: float
    max_abs_difference: float
    engine: str
    why: str
    workers: int
    ranks: int
    shares: dict[str, int]
    direct: bool
    verified: bool
    checked: bool
    resumed: int
    warnings: tuple[str, ...]


class Tally:
    """Statistics of all pieces; exact sums, so that the order in which workers finish does not show."""

    def __init__(self, alphas: int) -> None:
        self.elements = 0
        self.changed = [0] * alphas
        self.non_finite = [0] * alphas
        self.max_abs_d = 0.0
        self._d: list[float] = []
        self._aligned: list[float] = []
        self._moved: list[list[float]] = [[] for _ in range(alphas)]

    def add_chunk(self, chunk: Chunk, measured: Mapping[int, Statistics]) -> bool:
        """The statistics of a chunk's pieces, by number; False where they cannot be this chunk's."""
        for number, moved in measured.items():
            if not 0 <= number < len(chunk.pieces):
                return False
            step, start, stop, _ = chunk.pieces[number]
            if (step.sft is None and step.plain) or len(moved.counts) != len(step.counted):
                return False
            self.add(step, (stop - start) * 8 // BITS[step.dtype], moved)
        return True

    def add(self, step: Step, elements: int, moved: Statistics) -> None:
        """moved.counts are those of step.counted."""
        self.elements += elements if step.sft is not None else 0
        self.max_abs_d = max(self.max_abs_d, moved.max_abs_d)
        self._d.append(moved.d_squared)
        self._aligned.append(moved.aligned_squared)
        for k, (changed, non_finite) in zip(step.counted, moved.counts, strict=True):
            self.changed[k] += changed
            self.non_finite[k] += non_finite
            self._moved[k].append(step.alphas[k] ** 2 * moved.d_squared)

    @property
    def relative_distance(self) -> float:
        """|aligned - sft| / |aligned|; 0 where there is nothing to measure."""
        return _ratio(self._d, self._aligned)

    def output(self, k: int, path: str, alpha: float) -> Output:
        changed = self.changed[k] / self.elements if self.elements else 0.0
        return Output(path, alpha, changed, _ratio(self._moved[k], self._aligned), self.non_finite[k])

    def warnings(self) -> list[str]:
        """What the numbers say about the pair of inputs."""
        found = []
        distance = self.relative_distance
        if not math.isfinite(distance):
            found.append("aligned - sft is so large that its norm overflows fp32: are these two unrelated?")
        elif distance >= TOO_FAR:
            found.append(
                f"aligned - sft is {distance:.2g} times as large as aligned itself; for a model and the one it was "
                "trained from it is below 0.1: are these two unrelated?"
            )
        elif self.elements and not any(self._d) and not any(self.non_finite):
            found.append("sft and aligned are equal: the output is aligned; is one of the two paths wrong?")
        if any(self.non_finite):
            found.append(f"{max(self.non_finite)} elements of an output are inf or NaN")
        return found


def _ratio(squares: list[float], of: list[float]) -> float:
    below = exact_sum(of)
    return math.sqrt(exact_sum(squares) / below) if below else 0.0
