"""The streams of a software GPU: their operations run late, in any order that events allow, or when the host waits."""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ORDERS = ("needed", "at once")
IDS = itertools.count(1)


class Event:
    """An event of a stream, as torch.cuda.Event: it happens when the stream reaches it."""

    scheduler: Scheduler

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.happened = True

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.scheduler.current()
        self.happened = False
        self.scheduler.add(self.stream, ("record", self))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.scheduler.current()).wait_event(self)

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.scheduler.run_until(self)

    def elapsed_time(self, end: Event) -> float:
        return 1.0  # ms: a software GPU has no clock


class Stream:
    """A stream, as torch.cuda.Stream; the one without an argument `default` is a new one."""

    scheduler: Scheduler

    def __init__(self, device: Any = None, priority: int = 0, default: bool = False) -> None:
        self.device_index = self.scheduler.index(device)
        self.cuda_stream = 0 if default else next(IDS)
        self.queue: deque[Any] = deque()
        self.scheduler.streams.append(self)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", self.device_index)

    def wait_event(self, event: Event) -> None:
        if not event.happened:
            self.scheduler.add(self, ("wait", event))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        if self.queue:
            self.scheduler.run_until(self.record_event())


class Graph:
    """A captured graph, as torch.cuda.CUDAGraph: the works of one stream, which a replay enqueues."""

    scheduler: Scheduler

    def __init__(self, keep_graph: bool = False) -> None:
        self.works: list[Any] = []
        self.pool: list[Any] = []  # the memory that the capture allocated: a graph keeps it

    def replay(self) -> None:
        for work in self.works:
            self.scheduler.add(self.scheduler.current(), work)


class Scheduler:
    """All streams of all devices; each thread has a current device and a current stream of each device.

    Args:
        order: "needed" runs only the operations that the host waits for; "at once" runs every allowed operation as soon
            as it is enqueued; a number is the seed of a random order.
        devices: The number of devices.
    """

    def __init__(self, order: str | int = "needed", devices: int = 1) -> None:
        self.devices = devices
        self.lock = threading.RLock()
        Event.scheduler = Stream.scheduler = Graph.scheduler = self
        self.reset(order)

    def reset(self, order: str | int) -> None:
        """Forget all streams, their work and errors."""
        self.order = order
        self.random = random.Random(order)
        self.streams: list[Stream] = []
        self.local = threading.local()
        self.broken: Exception | None = None  # an error that stays, as CUDA's sticky errors do
        self.capturing: Graph | None = None
        Event.scheduler = Stream.scheduler = Graph.scheduler = self
        self.defaults = [Stream(i, default=True) for i in range(self.devices)]

    def index(self, device: Any = None) -> int:
        """Return the index of a device that is given as torch.cuda's functions take it."""
        import torch

        if device is None:
            return getattr(self.local, "device", 0)
        if isinstance(device, int):
            found = device
        else:
            device = torch.device(device)
            found = self.index() if device.index is None else device.index
        if not 0 <= found < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal: {found}")
        return int(found)

    def current(self, device: Any = None) -> Stream:
        index = self.index(device)
        return getattr(self.local, "streams", {}).get(index, self.defaults[index])

    def set_current(self, stream: Stream) -> None:
        self.local.streams = {**getattr(self.local, "streams", {}), stream.device_index: stream}

    @contextmanager
    def capture(self, graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        """Record the work of this thread's current stream in a graph in place of running it."""
        self.synchronize()
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def by_id(self, device: int, number: int) -> Stream:
        return next(s for s in self.streams if s.device_index == device and s.cuda_stream == number)

    def add(self, stream: Stream, work: Callable[[], None] | tuple[str, Event]) -> None:
        """Enqueue an operation, and run what a GPU could do before the host continues."""
        with self.lock:
            if self.broken is not None:
                raise self.broken
            if self.capturing is not None and stream is self.current():
                self.capturing.works.append(work)
                return
            stream.queue.append(work)
            while self.order == "at once" and self._runnable():
                self._run(self._runnable()[0])
            while isinstance(self.order, int) and self._runnable() and self.random.random() < 0.4:
                self._run(self.random.choice(self._runnable()))

    def run_until(self, event: Event) -> None:
        """Run operations until an event has happened."""
        with self.lock:
            while not event.happened:
                runnable = self._runnable()
                assert event.stream is not None
                self._run(self.random.choice(runnable) if isinstance(self.order, int) else self._needed(event.stream))
            if self.broken is not None:
                raise self.broken

    def synchronize(self, device: Any = None) -> None:
        index = self.index(device)
        for stream in [each for each in self.streams if each.device_index == index]:
            stream.synchronize()
        if self.broken is not None:
            raise self.broken

    def _needed(self, stream: Stream) -> Stream:
        head = stream.queue[0]
        if isinstance(head, tuple) and head[0] == "wait" and not head[1].happened:
            return self._needed(head[1].stream)
        return stream

    def _runnable(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.queue and self._needed(stream) is stream]

    def _run(self, stream: Stream) -> None:
        """Run the next work of a stream, and free memory whose last work it was."""
        self._run_one(stream.queue.popleft())
        while stream.queue and isinstance(stream.queue[0], tuple) and stream.queue[0][0] == "free":
            stream.queue.popleft()[1]()

    def _run_one(self, work: Any) -> None:
        if isinstance(work, tuple):
            if work[0] == "record":
                work[1].happened = True
            return
        if self.broken is not None:
            return
        try:
            work()
        except Exception as error:
            self.broken = error
