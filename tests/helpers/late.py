"""A simulated GPU whose streams run late, in any order that the events allow, on memory filled with a pattern."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from engine_calls import run_engine

from expo.dtypes import torch_dtypes
from expo.kernels import numerics, sweep
from expo.kernels.contract import Operand, Term, extrapolation_term
from expo.kernels.sweep import PART_ELEMENTS, Partials

POISON = 0x5A  # gives a finite number in fp32, so that statistics of unwritten memory are wrong and raise no error
NAMES = {dtype: name for name, dtype in torch_dtypes().items()}
STREAMS = ("up", "compute", "down")  # in the order in which the ring asks for them
ORDERS = ("needed", "at once", "up first", "compute first", "down first")


class Event:
    """An event of a stream; it happens when the stream reaches it."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.happened = False


class Late:
    """A simulated device whose operations run when the host waits for them, or when the order says so.

    Args:
        order: "needed" runs only the operations that an event needs; "at once" runs every allowed operation as soon as
            it is enqueued; "up first" and so on run, when the host waits, all allowed operations of one stream and then
            those of the others; a number is the seed of a random order.
        lost: A wait that is left out, as a fault of the lane: "compute" for the kernels' wait for the uploads, "down"
            for the downloads' wait for the kernels, "host" for the host's wait for the downloads.
    """

    def __init__(self, order: str | int = "needed", lost: str = "") -> None:
        self.order = order
        self.lost = lost
        self.random = random.Random(order)
        self.queues: dict[str, deque[Callable[[], None] | tuple[str, Event]]] = {}
        self.allocated = 0
        self.asked = 0
        self.waited: set[str] = set()

    def pinned(self, size: int) -> torch.Tensor:
        start = 4096  # O_DIRECT needs memory that starts at a page
        memory = self.memory(size + start)
        shift = -memory.data_ptr() % start
        return memory[shift : shift + size]

    def memory(self, size: int) -> torch.Tensor:
        self.allocated += size
        return torch.full((size,), POISON, dtype=torch.uint8)

    def stream(self) -> str:
        name = STREAMS[self.asked % len(STREAMS)]
        self.asked += 1
        self.queues.setdefault(name, deque())
        return name

    def enqueue(self, stream: str, work: Callable[[], None]) -> None:
        self.queues[stream].append(work)
        self._meanwhile()

    def record(self, stream: str) -> Event:
        event = Event(stream)
        self.queues[stream].append(("record", event))
        self._meanwhile()
        return event

    def wait(self, stream: str, event: Event) -> None:
        self.waited.add(stream)
        if stream != self.lost:
            self.queues[stream].append(("wait", event))

    def synchronize(self, event: Event) -> None:
        self.waited.add("host")
        if self.lost == "host":
            return
        while not event.happened:
            self._step(event)

    def drain(self, stream: str) -> None:
        while self.queues[stream]:
            last = Event(stream)
            self.queues[stream].append(("record", last))
            while not last.happened:
                self._step(last)

    def _meanwhile(self) -> None:
        """Run the operations that a GPU could finish before the host continues."""
        while self.order == "at once" and self._runnable():
            self._run(self._runnable()[0])
        while isinstance(self.order, int) and self._runnable() and self.random.random() < 0.4:
            self._run(self.random.choice(self._runnable()))

    def _step(self, event: Event) -> None:
        """Run one allowed operation; repeated calls reach the operation that `event` needs."""
        runnable = self._runnable()
        if isinstance(self.order, int):
            self._run(self.random.choice(runnable))
        elif self.order.endswith(" first") and self.order.split()[0] in runnable:
            self._run(self.order.split()[0])
        else:
            self._run(self._needed(event.stream))

    def _needed(self, stream: str) -> str:
        """Return the stream that must run next before `stream` can continue."""
        head = self.queues[stream][0]
        if isinstance(head, tuple) and head[0] == "wait" and not head[1].happened:
            return self._needed(head[1].stream)
        return stream

    def _runnable(self) -> list[str]:
        return [name for name, queue in self.queues.items() if queue and self._needed(name) == name]

    def _run(self, stream: str) -> None:
        work = self.queues[stream].popleft()
        if not isinstance(work, tuple):
            work()
        elif work[0] == "record":
            work[1].happened = True


def kernel(anchor: Operand, terms: Sequence[Term], outs: torch.Tensor, partials: Partials | None = None) -> None:
    """Compute as `sweep.launch` by the NumPy engine on the same memory, with a row of statistics for each part."""
    alphas, _, sft = extrapolation_term("a test's", anchor, terms)
    pair = sft.dtype, anchor.dtype
    assert pair == (NAMES[sft.memory.dtype], NAMES[anchor.memory.dtype])
    if partials is not None:
        assert len(partials.sums) == len(partials.counts) == sweep.partial_rows(anchor.elements)
        partials.sums.zero_()
        partials.counts.zero_()
    for row, at in enumerate(range(0, anchor.elements, PART_ELEMENTS)):
        s, a, results = (_bytes(x[..., at : at + PART_ELEMENTS]) for x in (sft.memory, anchor.memory, outs))
        moved = run_engine(numerics.extrapolate, s, a, pair, list(results), alphas.tolist(), partials is not None)
        if partials is not None and moved is not None:
            partials.sums[row] = torch.tensor(moved[:3])
            partials.counts[row] = torch.tensor([changed | wild << 16 for changed, wild in moved.counts])


def _bytes(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return tensor.view(torch.uint8).numpy()


def poison(buffers: Sequence[memoryview]) -> None:
    for buffer in buffers:
        np.frombuffer(buffer, np.uint8)[:] = POISON
