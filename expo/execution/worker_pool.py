"""The workers: chunks from one queue, computed into buffers, handed to a sink.

A worker does all of a chunk, so reading, computing and writing overlap without queues between them. Memory is bounded
by the buffers, whatever the size of a tensor, shard or model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

from ..errors import Cancelled, EngineError, ExpoError
from ..memory import MIB, PAGE, page_aligned
from ..planning.plan import Plan
from ..planning.shards import Chunk, Measured
from .engines import Engine
from .gpu_kernels import error_text
from .tensor_source import Source

BUFFERS = 32 * MIB  # bytes of all workers' buffers together, at most
CHUNK = 4 * MIB  # bytes of one output; 2 to 8 MiB were equally fast, and less of it is less memory
RING_SLOTS = 3  # chunks under way on a GPU: one that the host fills or empties, one going up, one coming down
TICK = 0.05  # seconds between two reports of progress

Progress = Callable[[int, int], None]
Tick = Callable[[int], None]  # (bytes of output done)
Landed = Callable[[Chunk, Measured], None]
Sink = Callable[[int, Chunk, memoryview], None]  # (output's number, chunk, its bytes in a page-aligned buffer)


def chunk_size(workers: int, outputs: int) -> int:
    """Bytes of a chunk such that the buffers of all workers and outputs stay within BUFFERS; a multiple of 4096."""
    return max(min(CHUNK, BUFFERS // (workers * outputs)) // PAGE, 1) * PAGE


class Queue:
    """A plan's chunks, one by one to any thread; the next chunk's inputs are being read meanwhile.

    One chunk ahead and no more: from a cold cache 1, 4, 16 and 64 chunks took 0.88, 1.12, 1.0 and 1.08 of the time of
    reading the inputs with `cat`.
    """

    def __init__(self, chunks: Iterator[Chunk], source: Source) -> None:
        self._chunks = chunks
        self._source = source
        self._lock = threading.Lock()
        self._coming: Chunk | None = None
        self._advance()

    def take(self) -> Chunk | None:
        """The next chunk, or None after the last."""
        with self._lock:
            chunk = self._coming
            self._advance()
            return chunk

    def _advance(self) -> None:
        self._coming = next(self._chunks, None)
        for piece in self._coming.pieces if self._coming else ():
            self._source.ahead(piece)


class Result(NamedTuple):
    """A chunk that is computed: its bytes for each output, and the statistics of pieces, by their number."""

    buffers: Sequence[memoryview]
    measured: Measured
    engine: str = ""  # the name of the one that computed it, where that is not the lane's


class Lane(Protocol):
    """What a worker computes chunks with: `depth` of them may be under way; for one thread."""

    depth: int

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk."""

    def finish(self) -> Result:
        """The chunk begun first; its buffers stay until `depth` more have begun."""

    def close(self) -> None:
        """Wait for whatever is under way, and let go of it."""


class Direct:
    """The lane of an engine on the CPU: a chunk is computed when it begins."""

    depth = 1

    def __init__(self, engine: Engine, outputs: int, source: Source, size: int, measure: bool) -> None:
        self._engine = engine
        self._source = source
        self._measure = measure
        self._buffers = [page_aligned(size) for _ in range(outputs)]
        self._measured: Measured = {}

    def begin(self, chunk: Chunk) -> None:
        put_header(chunk, self._buffers)
        self._measured = {}
        for i, (step, start, stop, at) in enumerate(chunk.pieces):
            outs = [buffer[at : at + stop - start] for buffer in self._buffers]
            moved = self._source.compute(self._engine, step, start, stop, outs, self._measure)
            if moved is not None:
                self._measured[i] = moved

    def finish(self) -> Result:
        return Result(self._buffers, self._measured)

    def close(self) -> None:
        pass


def put_header(chunk: Chunk, buffers: Sequence[memoryview]) -> None:
    """The part of the file's header that lies in the chunk."""
    header = chunk.shard.header[chunk.start : chunk.stop]
    for buffer in buffers:
        buffer[: len(header)] = header


class Pass:
    """One pass over chunks of a plan by a crew: a thread for each engine in it, the faster ones take more.

    shares: bytes of output by the name of the engine that computed them. notes: sentences for warnings, about GPUs that
    failed.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        crew: Sequence[Engine],
        sink: Sink,
        landed: Landed | None = None,
        *,
        chunks: Iterator[Chunk],
        size: int,
    ) -> None:
        """landed: told, in the thread of run(), of every chunk that the sink has taken for all outputs.

        chunks: those to do, of `size` bytes at most.
        """
        self._source = source
        self._crew = crew
        self.shares = dict.fromkeys((engine.name for engine in crew), 0)
        self.notes: dict[str, None] = {}  # in order, each once
        self._sink = sink
        self._landed = landed
        self._size = size
        self._plan = plan
        self._queue = Queue(chunks, source)
        self._finished: deque[tuple[str, Chunk, Measured]] = deque()  # chunks that run() has not heard of
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, tick: Tick, cancel: threading.Event | None = None) -> None:
        """Do all of it. tick(bytes of output done) is called in this thread, now and then.

        Raises Cancelled when `cancel` is set, else whatever a worker or `tick` raised; no thread is left running, and
        `landed` knows of all that was done.
        """
        threads = [
            threading.Thread(target=self._work, args=(engine,), name=f"expo-{engine.name}") for engine in self._crew
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and not (cancel is not None and cancel.is_set()):
                    thread.join(TICK)
                    self._report()
                    tick(sum(self.shares.values()))
                    self._source.give_way()
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._report()
        if self._failure is not None:
            raise self._failure
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled")
        tick(sum(self.shares.values()))

    def _report(self) -> None:
        while self._finished:
            name, chunk, measured = self._finished.popleft()
            size = (chunk.stop - chunk.start) * len(self._plan.alphas)
            self.shares[name] = self.shares.get(name, 0) + size
            if self._landed is not None:
                self._landed(chunk, measured)

    def _lane(self, engine: Engine) -> Lane:
        measure = self._landed is not None
        if engine.gpu is None:
            return Direct(engine, len(self._plan.alphas), self._source, self._size, measure)
        from .fallback_lane import LaneWithReserve
        from .gpu_lane import Ring

        def ring() -> Ring:
            return Ring(engine.gpu, self._plan, self._source, self._size, measure)

        if engine.reserve is None:
            return ring()
        name, where = engine.reserve.name, engine.gpu.device

        def failed(reason: str) -> None:
            note = f"{where} failed, and --engine {name} did its part, with the same bits. The reason: {reason}"
            self.notes[note] = None

        reserve = Direct(engine.reserve, len(self._plan.alphas), self._source, self._size, measure)
        return LaneWithReserve(ring, reserve, name, failed)

    def _work(self, engine: Engine) -> None:
        try:
            with closing(self._lane(engine)) as lane:
                self._drive(lane, engine.name)
        except (ExpoError, OSError) as error:  # they say all there is to say
            self._fail(error)
        except Exception as error:
            # Of a GPU: out of memory, a kernel that does not compile. A compiler's errors are of no common kind.
            known = isinstance(error, RuntimeError) or engine.name == "triton"
            self._fail(EngineError(f"--engine {engine.name} failed: {error_text(error)}") if known else error)
        except BaseException as error:  # whatever it is, the thread that called run() raises it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._stop.set()

    def _drive(self, lane: Lane, name: str) -> None:
        """Begin chunks until as many are under way as may be, then hand the first to the sink for every one begun."""
        under_way: deque[Chunk] = deque()
        while not self._stop.is_set():
            chunk = self._queue.take()
            if chunk is not None:
                lane.begin(chunk)
                under_way.append(chunk)
            if not under_way:
                return
            if chunk is None or len(under_way) == lane.depth:
                done = under_way.popleft()
                result = lane.finish()
                for k, buffer in enumerate(result.buffers):
                    self._sink(k, done, buffer)
                self._finished.append((result.engine or name, done, result.measured))
