"""The result of a merge, and the statistics of how much the weights changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..dtypes import BITS
from ..kernels.contract import Statistics, exact_sum
from ..planning.shards import Chunk
from ..planning.steps import Step

TOO_FAR = 0.5  # |aligned - sft| / |aligned|, which is below 0.1 for related models and above 1 for unrelated ones


@dataclass(frozen=True)
class Output:
    """One finished output.

    Attributes:
        path: The path of the output.
        alpha: The alpha of the output.
        changed: The share of the extrapolated elements whose value differs from aligned's in the output's dtype.
        relative_change: The 2-norm of alpha * (aligned - sft) over that of aligned, both over the extrapolated tensors.
        non_finite: The number of elements that are inf or NaN after the extrapolation or the conversion.
    """

    path: str
    alpha: float
    changed: float
    relative_change: float
    non_finite: int


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        outputs: One output for each alpha.
        extrapolated: The number of tensors that were extrapolated.
        copied: (tensor, reason) of each tensor that was copied from aligned.
        noted: (tensor, remark) of each extrapolated tensor that has another name or shape in sft.
        dropped: (tensor, reason) of each tensor that only sft has.
        left_out: (file, reason) of each file of aligned's folder that the output does not get.
        bytes_read: Bytes of the inputs' tensors that were read.
        bytes_written: Bytes of the outputs' weight files.
        seconds: Wall time of the merge.
        relative_distance: The 2-norm of aligned - sft over that of aligned.
        max_abs_difference: The largest element of |aligned - sft|.
        engine: The name of the engine that computed.
        why: The reason for this engine.
        workers: The number of workers of each process.
        ranks: The number of processes.
        shares: Bytes of output by the name of the engine that computed or copied them. In a worker on a GPU, the engine
            of the CPU copies tensors, and computes small pieces and F64 tensors.
        direct: True if all of the output was written with O_DIRECT.
        verified: True if the output was read back and compared.
        checked: True if transformers has loaded the output.
        resumed: Bytes of output that an interrupted merge had made durable.
        warnings: Sentences that the user should read.
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
    """The statistics of all pieces. Their sums are exact, so the order in which workers finish does not change them.

    Attributes:
        elements: The number of extrapolated elements.
        changed: The number of elements of each output that differ from aligned's.
        non_finite: The number of elements of each output that are inf or NaN.
        max_abs_d: The largest element of |aligned - sft|.
    """

    def __init__(self, outputs: int) -> None:
        """Start all statistics at 0, for this number of outputs."""
        self.elements = 0
        self.changed = [0] * outputs
        self.non_finite = [0] * outputs
        self.max_abs_d = 0.0
        self._d_squares: list[float] = []  # |aligned - sft|^2 of each piece
        self._aligned_squares: list[float] = []  # |aligned|^2 of each piece
        self._change_squares: list[list[float]] = [[] for _ in range(outputs)]  # |alpha * (aligned - sft)|^2

    def add_chunk(self, chunk: Chunk, measured: Mapping[int, Statistics]) -> bool:
        """Add the statistics of a chunk's pieces; return False if they cannot belong to this chunk.

        Args:
            chunk: The chunk.
            measured: The statistics of each measured piece, by the piece's index in the chunk.
        """
        for number, statistics in measured.items():
            if not 0 <= number < len(chunk.pieces):
                return False
            step, start, stop, _ = chunk.pieces[number]
            if (step.sft is None and step.plain) or len(statistics.counts) != len(step.counted):
                return False
            self._add_piece(step, (stop - start) * 8 // BITS[step.dtype], statistics)
        return True

    def _add_piece(self, step: Step, elements: int, statistics: Statistics) -> None:
        """Add the statistics of a piece, whose counts belong to the outputs `step.counted`."""
        self.elements += elements if step.sft is not None else 0
        self.max_abs_d = max(self.max_abs_d, statistics.max_abs_d)
        self._d_squares.append(statistics.d_squared)
        self._aligned_squares.append(statistics.aligned_squared)
        for k, (changed, non_finite) in zip(step.counted, statistics.counts, strict=True):
            self.changed[k] += changed
            self.non_finite[k] += non_finite
            self._change_squares[k].append(step.alphas[k] ** 2 * statistics.d_squared)

    @property
    def relative_distance(self) -> float:
        """|aligned - sft| / |aligned|; 0 if no tensor was measured."""
        return _norm_ratio(self._d_squares, self._aligned_squares)

    def output(self, k: int, path: str, alpha: float) -> Output:
        """Return output k with its statistics."""
        changed = self.changed[k] / self.elements if self.elements else 0.0
        return Output(
            path, alpha, changed, _norm_ratio(self._change_squares[k], self._aligned_squares), self.non_finite[k]
        )

    def warnings(self) -> list[str]:
        """Return sentences about inputs that look unrelated or equal, and about elements that are inf or NaN."""
        warnings = []
        distance = self.relative_distance
        if not math.isfinite(distance):
            warnings.append("aligned - sft is so large that its norm overflows fp32: are the two models unrelated?")
        elif distance >= TOO_FAR:
            warnings.append(
                f"aligned - sft is {distance:.2g} times as large as aligned itself; for a model and the one it was "
                "trained from it is below 0.1: are the two models unrelated?"
            )
        elif self.elements and not any(self._d_squares) and not any(self.non_finite):
            warnings.append("sft and aligned are equal: the output is aligned; is one of the two paths wrong?")
        if any(self.non_finite):
            warnings.append(f"{max(self.non_finite)} elements of an output are inf or NaN")
        return warnings


def _norm_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the ratio of two 2-norms, each given by the squared norms of its parts; 0 if the second norm is 0."""
    denominator = exact_sum(denominators)
    return math.sqrt(exact_sum(numerators) / denominator) if denominator else 0.0
