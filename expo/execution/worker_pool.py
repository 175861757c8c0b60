"""Run the workers: threads that take chunks from one queue, compute them in lanes, and give the buffers to a sink.

One worker reads, computes and writes a chunk, so these three overlap between workers without further queues. The size
of the buffers bounds the memory, whatever the sizes of tensors, shards and models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from ..errors import Cancelled, EngineError, ExpoError
from ..memory import MIB, PAGE
from ..planning.shards import Chunk, ChunkStatistics
from .engines import Engine
from .gpu_fallback import error_text
from .lanes import Lane
from .tensor_source import TensorSource

MOST_BUFFER_BYTES = 32 * MIB  # of the output buffers of all workers together
CHUNK = 4 * MIB  # bytes of a chunk of one output; 2 to 8 MiB were equally fast, and smaller chunks take less memory
TICK = 0.05  # seconds between two calls of `tick`, which reports the progress

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Tick = Callable[[int], None]  # (bytes of output done)
Sink = Callable[[int, Chunk, memoryview], None]  # (the output's number, chunk, its bytes in a page-aligned buffer)
OnWritten = Callable[[Chunk, ChunkStatistics], None]  # (a chunk that the sink has taken, its statistics)


def chunk_size(workers: int, outputs: int) -> int:
    """Return the number of bytes of a chunk, a multiple of 4096, with which all buffers fit into MOST_BUFFER_BYTES."""
    return max(min(CHUNK, MOST_BUFFER_BYTES // (workers * outputs)) // PAGE, 1) * PAGE


class ChunkQueue:
    """A queue of chunks for any number of threads, which asks the system to read the inputs of the next chunk.

    The queue reads one chunk ahead and no more: from a cold cache, a merge that read 1, 4, 16 or 64 chunks ahead took
    0.88, 1.12, 1.0 or 1.08 times as long as `cat` of both inputs.
    """

    def __init__(self, chunks: Iterator[Chunk], source: TensorSource) -> None:
        """Ask the system to read the inputs of the first chunk."""
        self._chunks = chunks
        self._source = source
        self._lock = threading.Lock()
        self._next: Chunk | None = None
        self._advance()

    def take(self) -> Chunk | None:
        """Return the next chunk, or None after the last."""
        with self._lock:
            chunk = self._next
            self._advance()
            return chunk

    def _advance(self) -> None:
        self._next = next(self._chunks, None)
        for piece in self._next.pieces if self._next else ():
            self._source.read_ahead(piece)


class WorkerPool:
    """The workers of one pass over chunks, each a thread with an engine; faster workers take more chunks.

    Attributes:
        shares: The number of bytes of output that each engine has computed or copied, by the engine's name.
    """

    def __init__(
        self,
        source: TensorSource,
        engines: Sequence[Engine],
        make_lane: Callable[[Engine], Lane],
        sink: Sink,
        on_written: OnWritten | None = None,
    ) -> None:
        """Prepare a pass.

        Args:
            source: The bytes of both inputs, which the pool reads ahead.
            engines: One engine for each worker.
            make_lane: Returns the lane of a worker. The worker's thread calls it.
            sink: Takes the bytes of a chunk, once for each output. The worker's thread calls it.
            on_written: Takes every chunk that the sink has taken for all outputs. The thread of `run` calls it.
        """
        self._source, self._engines, self._make_lane = source, engines, make_lane
        self._sink, self._on_written = sink, on_written
        self.shares = dict.fromkeys((engine.name for engine in engines), 0)
        # Chunks that the sink has taken and run() has not reported yet: (bytes by engine, chunk, statistics).
        self._unreported: deque[tuple[dict[str, int], Chunk, ChunkStatistics]] = deque()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, chunks: Iterator[Chunk], tick: Tick, cancel: threading.Event | None = None) -> None:
        """Compute all chunks.

        When this method returns or raises, no worker runs, and `on_written` has had every chunk that the sink has
        taken.

        Args:
            chunks: The chunks, none larger than the lanes' buffers.
            tick: Takes the number of output bytes done. This thread calls it every TICK seconds.
            cancel: An event that stops the workers when another thread sets it.

        Raises:
            Cancelled: `cancel` was set.
            ExpoError, OSError: A worker or `tick` failed; the error is the worker's or `tick`'s own.
        """
        queue = ChunkQueue(chunks, self._source)
        threads = [
            threading.Thread(target=self._run_worker, args=(engine, queue), name=f"expo-{engine.name}")
            for engine in self._engines
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and not (cancel is not None and cancel.is_set()):
                    thread.join(TICK)
                    self._report()
                    tick(sum(self.shares.values()))
                    self._source.yield_to_writers()
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
        """Count the chunks that the sink has taken, and pass them to `on_written`."""
        while self._unreported:
            shares, chunk, measured = self._unreported.popleft()
            for name, size in shares.items():
                self.shares[name] = self.shares.get(name, 0) + size
            if self._on_written is not None:
                self._on_written(chunk, measured)

    def _run_worker(self, engine: Engine, queue: ChunkQueue) -> None:
        """Run one worker: make its lane, compute chunks, and record the error if one is raised."""
        try:
            with closing(self._make_lane(engine)) as lane:
                self._run_lane(lane, engine.name, queue)
        except (ExpoError, OSError) as error:  # the messages of these errors are complete
            self._fail(error)
        except Exception as error:
            # A GPU may run out of memory, or a kernel may not compile. Errors of a compiler have no common base class.
            is_of_engine = isinstance(error, RuntimeError) or engine.name == "triton"
            self._fail(EngineError(f"`engine={engine.name!r}` failed: {error_text(error)}") if is_of_engine else error)
        except BaseException as error:  # the thread that called run() raises every error
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._stop.set()

    def _run_lane(self, lane: Lane, name: str, queue: ChunkQueue) -> None:
        """Compute the chunks of the queue, at most `depth` of them at the same time, and pass them to the sink."""
        under_way: deque[Chunk] = deque()
        while not self._stop.is_set():
            chunk = queue.take()
            if chunk is not None:
                lane.begin(chunk)
                under_way.append(chunk)
            if not under_way:
                return
            if chunk is None or len(under_way) == lane.depth:
                done = under_way.popleft()
                computed = lane.finish()
                for k, buffer in enumerate(computed.buffers):
                    self._sink(k, done, buffer)
                outputs = max(len(computed.buffers), 1)  # a lane that only measures has no buffers
                own = (done.stop - done.start) * outputs - sum(computed.others.values())
                self._unreported.append(({name: own, **computed.others}, done, computed.measured))
