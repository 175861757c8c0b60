"""Lanes: how one worker computes chunks. A lane on the CPU computes a chunk when it begins; one on a GPU runs ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ..memory import page_aligned
from ..planning.shards import Chunk, Measured
from .engines import Engine
from .tensor_source import TensorSource

RING_SLOTS = 3  # chunks under way on a GPU: one that the host fills or empties, one going up, one coming down


class ComputedChunk(NamedTuple):
    """A chunk after its computation.

    Attributes:
        buffers: The bytes of the chunk, one page-aligned buffer for each output.
        measured: The statistics of the pieces that have any.
        engine: The name of the engine that computed the chunk, where it is not the worker's own; else "".
    """

    buffers: Sequence[memoryview]
    measured: Measured
    engine: str = ""


class Lane(Protocol):
    """What a worker computes chunks with, in one thread; at most `depth` chunks are under way."""

    depth: int

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk."""

    def finish(self) -> ComputedChunk:
        """Return the chunk that was begun first; its buffers stay as they are until `depth` more have begun."""

    def close(self) -> None:
        """Wait for all that is under way, and release memory."""


class CpuLane:
    """The lane of an engine on the CPU."""

    depth = 1

    def __init__(self, engine: Engine, source: TensorSource, outputs: int, chunk_bytes: int, measure: bool) -> None:
        """Allocate buffers.

        Args:
            engine: What computes.
            source: The bytes of both inputs.
            outputs: The number of outputs.
            chunk_bytes: The size of the largest chunk.
            measure: True to return statistics of every piece.
        """
        self._engine, self._source, self._measure = engine, source, measure
        self._buffers = [page_aligned(chunk_bytes) for _ in range(outputs)]
        self._measured: Measured = {}

    def begin(self, chunk: Chunk) -> None:
        write_header(chunk, self._buffers)
        self._measured = {}
        for i, (step, start, stop, at) in enumerate(chunk.pieces):
            outs = [buffer[at : at + stop - start] for buffer in self._buffers]
            statistics = self._source.compute(self._engine, step, start, stop, outs, self._measure)
            if statistics is not None:
                self._measured[i] = statistics

    def finish(self) -> ComputedChunk:
        return ComputedChunk(self._buffers, self._measured)

    def close(self) -> None:
        pass


def write_header(chunk: Chunk, buffers: Sequence[memoryview]) -> None:
    """Write the part of the file's header that lies in the chunk into every buffer."""
    header = chunk.shard.header[chunk.start : chunk.stop]
    for buffer in buffers:
        buffer[: len(header)] = header
