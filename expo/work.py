"""The workers: chunks from one queue, computed into buffers, handed to a sink.

A worker does all of a chunk, so reading, computing and writing overlap without queues between them. Memory is bounded
by the buffers, whatever the size of a tensor, shard or model; consumed pages of the inputs are let go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

from .checkpoint import Checkpoint
from .engines import Engine
from .errors import Cancelled, EngineError
from .header import DTYPES
from .plan import Chunk, Piece, Plan, Step, cut
from .result import Tally
from .writer import BLOCK, aligned_buffer

MIB = 1 << 20
BUFFERS = 32 * MIB  # bytes of all workers' buffers together, at most
CHUNK = 4 * MIB  # bytes of one output; 2 to 8 MiB were equally fast, and less of it is less memory
RING_SLOTS = 3  # chunks under way on a GPU: one that the host fills or empties, one going up, one coming down
TICK = 0.05  # seconds between two reports of progress

Progress = Callable[[int, int], None]
Sink = Callable[[int, Chunk, memoryview], None]  # (output's number, chunk, its bytes in a page-aligned buffer)


def chunk_size(workers: int, outputs: int) -> int:
    """Bytes of a chunk such that the buffers of all workers and outputs stay within BUFFERS; a multiple of 4096."""
    return max(min(CHUNK, BUFFERS // (workers * outputs)) // BLOCK, 1) * BLOCK


class Source:
    """Both checkpoints' bytes: has any run of a step's bytes computed. Safe for any number of threads."""

    def __init__(self, sft: Checkpoint, aligned: Checkpoint) -> None:
        self._sft = sft
        self._aligned = aligned

    def ahead(self, piece: Piece) -> None:
        """Ask the system to start reading what a piece will need."""
        step, start, stop, _ = piece
        self._aligned.shard(step.name).ahead(step.aligned.start + start, step.aligned.start + stop)
        if step.sft is not None:
            low, high = _twin_bytes(step, start, stop)
            self._sft.shard(step.name).ahead(low, high)

    @contextmanager
    def reading(self, step: Step, start: int, stop: int) -> Iterator[tuple[memoryview, memoryview]]:
        """The mapped bytes of (sft, aligned) for bytes [start, stop) of the step's tensor; sft's are empty for a copy.

        The pages are let go afterwards.
        """
        shard, first = self._aligned.shard(step.name), step.aligned.start
        aligned = shard.map()[first + start : first + stop]
        if step.sft is None:
            yield memoryview(b""), aligned
        else:
            low, high = _twin_bytes(step, start, stop)
            twin = self._sft.shard(step.name)
            yield twin.map()[low:high], aligned
            twin.release(low, high)
        shard.release(first + start, first + stop)

    def compute(
        self, engine: Engine, step: Step, start: int, stop: int, outs: Sequence[Any], tally: Tally | None = None
    ) -> None:
        """Fill outs[k], one for each alpha, with bytes [start, stop) of the step's tensor; cut between elements.

        Raises EngineError where the engine refuses.
        """
        active = active_outputs(step)
        with self.reading(step, start, stop) as (sft, aligned):
            for k, out in enumerate(outs):
                if k not in active:
                    out[:] = aligned
            if active:
                _extrapolate(engine, step, sft, aligned, [outs[k] for k in active], active, tally)


def active_outputs(step: Step) -> list[int]:
    """The numbers of the outputs for which the step is not a copy."""
    return [] if step.sft is None else [k for k, alpha in enumerate(step.alphas) if alpha]


def _extrapolate(
    engine: Engine,
    step: Step,
    sft: memoryview,
    aligned: memoryview,
    outs: Sequence[Any],
    active: Sequence[int],
    tally: Tally | None,
) -> None:
    assert step.sft is not None
    n = len(aligned) * 8 // DTYPES[step.aligned.dtype]
    alphas = [step.alphas[k] for k in active]
    try:
        moved = engine.run(sft, step.sft.dtype, aligned, step.aligned.dtype, n, outs, alphas, tally is not None)
    except RuntimeError as error:
        raise EngineError(f"--engine {engine.name} failed on {step.name}: {error}") from error
    if tally is not None and moved is not None:
        tally.add(step, n, active, moved)


def _twin_bytes(step: Step, start: int, stop: int) -> tuple[int, int]:
    """Where in sft's file the elements are whose bytes in the tensor of aligned are [start, stop)."""
    assert step.sft is not None
    bits, sft_bits = DTYPES[step.aligned.dtype], DTYPES[step.sft.dtype]
    return step.sft.start + start * sft_bits // bits, step.sft.start + stop * sft_bits // bits


class Queue:
    """A plan's chunks, one by one to any thread; the next chunk's inputs are being read meanwhile.

    One chunk ahead and no more: from a cold cache 1, 4, 16 and 64 chunks took 0.88, 1.12, 1.0 and 1.08 of the time of
    reading the inputs with `cat`.
    """

    def __init__(self, plan: Plan, source: Source, size: int) -> None:
        self._chunks = cut(plan, size)
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


class Lane(Protocol):
    """What a worker computes chunks with: `depth` of them may be under way; for one thread."""

    depth: int

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk."""

    def finish(self) -> Sequence[memoryview]:
        """The bytes of the chunk begun first, for each output; they stay until `depth` more have begun."""

    def close(self) -> None:
        """Wait for whatever is under way, and let go of it."""


class Direct:
    """The lane of an engine on the CPU: a chunk is computed when it begins."""

    depth = 1

    def __init__(self, engine: Engine, outputs: int, source: Source, size: int, tally: Tally | None) -> None:
        self._engine = engine
        self._source = source
        self._tally = tally
        self._buffers = [aligned_buffer(size) for _ in range(outputs)]

    def begin(self, chunk: Chunk) -> None:
        put_header(chunk, self._buffers)
        for step, start, stop, at in chunk.pieces:
            outs = [buffer[at : at + stop - start] for buffer in self._buffers]
            self._source.compute(self._engine, step, start, stop, outs, self._tally)

    def finish(self) -> Sequence[memoryview]:
        return self._buffers

    def close(self) -> None:
        pass


def put_header(chunk: Chunk, buffers: Sequence[memoryview]) -> None:
    """The part of the file's header that lies in the chunk."""
    header = chunk.shard.header[chunk.start : chunk.stop]
    for buffer in buffers:
        buffer[: len(header)] = header


class Pass:
    """One pass over a plan's chunks by a crew: a thread for each engine in it, the faster ones take more.

    shares: bytes of output by the name of the engine that computed them.
    """

    def __init__(
        self, plan: Plan, source: Source, crew: Sequence[Engine], sink: Sink, tally: Tally | None = None
    ) -> None:
        self._plan = plan
        self._source = source
        self._crew = crew
        self.shares = dict.fromkeys((engine.name for engine in crew), 0)
        self._sink = sink
        self._tally = tally
        self._size = chunk_size(len(crew), len(plan.alphas))
        self._queue = Queue(plan, source, self._size)
        self._finished: deque[tuple[str, int]] = deque()  # (engine, bytes) of chunks that progress has not heard of
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, progress: Progress | None = None, cancel: threading.Event | None = None) -> None:
        """Do all of it. progress(done, total) is called in this thread, in bytes of output.

        Raises Cancelled when `cancel` is set, else whatever a worker or `progress` raised; no thread is left running.
        """
        threads = [
            threading.Thread(target=self._work, args=(engine,), name=f"expo-{engine.name}") for engine in self._crew
        ]
        total, done = self._plan.output_bytes, 0
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK)
                    done = self._report(progress, done, total)
                    if cancel is not None and cancel.is_set() and not self._stop.is_set():
                        raise Cancelled("cancelled; nothing was left behind")
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled; nothing was left behind")
        self._report(progress, done, total)

    def _report(self, progress: Progress | None, done: int, total: int) -> int:
        before = done
        while self._finished:
            name, count = self._finished.popleft()
            self.shares[name] += count
            done += count
        if progress is not None and (done > before or not done):
            progress(done, total)
        return done

    def _lane(self, engine: Engine) -> Lane:
        if engine.gpu is None:
            return Direct(engine, len(self._plan.alphas), self._source, self._size, self._tally)
        from .ring import Ring

        return Ring(engine.gpu, self._plan, self._source, self._size, self._tally)

    def _work(self, engine: Engine) -> None:
        try:
            with closing(self._lane(engine)) as lane:
                self._drive(lane, engine.name)
        except RuntimeError as error:  # of a GPU: out of memory, a kernel that does not compile
            self._fail(EngineError(f"--engine {engine.name} failed: {error}"))
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
                buffers = lane.finish()
                for k, buffer in enumerate(buffers):
                    self._sink(k, done, buffer)
                self._finished.append((name, (done.stop - done.start) * len(buffers)))
