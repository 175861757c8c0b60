"""Define lanes, which compute the chunks of one worker.

A lane on the CPU computes a chunk in `begin`. A lane on a GPU has several chunks under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ..memory import PAGE, page_aligned
from ..planning.shards import Chunk, ChunkStatistics
from .engines import Engine
from .tensor_source import TensorSource

RING_SLOTS = 3  # chunks under way in a lane of a GPU: one goes to the GPU, one comes back, the host fills a third
MOST_RING_SLOTS = 16  # in all lanes of a process together, whose pinned memory they bound


class ComputedChunk(NamedTuple):
    """The bytes and statistics of a chunk that a lane has computed.

    Attributes:
        buffers: The bytes of the chunk, one page-aligned buffer for each output.
        measured: The statistics of the pieces that have any.
        others: Bytes of all outputs that an engine other than the worker's computed or copied, by the engine's name.
    """

    buffers: Sequence[memoryview]
    measured: ChunkStatistics
    others: Mapping[str, int] = MappingProxyType({})


class Lane(Protocol):
    """An object that computes the chunks of one worker, in the worker's thread.

    Attributes:
        depth: The largest number of chunks that are begun and not finished.
    """

    depth: int

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk."""

    def finish(self) -> ComputedChunk:
        """Return the chunk that was begun first; its buffers keep their bytes until `depth` more chunks are begun."""

    def close(self) -> None:
        """Wait for the chunks that are under way, and release memory."""


class CpuLane:
    """The lane of an engine on the CPU."""

    depth = 1

    def __init__(self, engine: Engine, source: TensorSource, outputs: int, chunk_bytes: int, measure: bool) -> None:
        """Allocate buffers.

        Args:
            engine: The engine that computes.
            source: The bytes of both inputs.
            outputs: The number of outputs.
            chunk_bytes: The size of the largest chunk in bytes.
            measure: True to measure the statistics of every piece.
        """
        self._engine, self._source, self._measure = engine, source, measure
        pitch = -(-chunk_bytes // PAGE) * PAGE
        memory = page_aligned(pitch * outputs)  # a GPU writes outputs that are equally far apart in one pass
        self._buffers = [memory[k * pitch :][:chunk_bytes] for k in range(outputs)]
        self._measured: ChunkStatistics = {}

    def begin(self, chunk: Chunk) -> None:
        """Compute a chunk."""
        write_header(chunk, self._buffers)
        self._measured = {}
        for i, (step, start, stop, at) in enumerate(chunk.pieces):
            outs = [buffer[at : at + stop - start] for buffer in self._buffers]
            statistics = self._source.compute(self._engine, step, start, stop, outs, self._measure)
            if statistics is not None:
                self._measured[i] = statistics

    def finish(self) -> ComputedChunk:
        """Return the chunk that `begin` has computed."""
        return ComputedChunk(self._buffers, self._measured)

    def close(self) -> None:
        """Do nothing, because no chunk is under way."""


def ring_slots(engines: Sequence[Engine]) -> int:
    """Return the number of slots of each lane on a GPU: with many workers, two are enough to keep the bus busy.

    Args:
        engines: One engine for each worker.
    """
    lanes = sum(engine.streams for engine in engines)
    return max(2, min(RING_SLOTS, MOST_RING_SLOTS // max(lanes, 1)))


def write_header(chunk: Chunk, buffers: Sequence[memoryview]) -> None:
    """Copy the part of the file's header that lies in the chunk into every buffer."""
    header = chunk.shard.header[chunk.start : chunk.stop]
    for buffer in buffers:
        buffer[: len(header)] = header
