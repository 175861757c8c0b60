"""The lines that need CUDA (or ROCm), and nothing else: memory, streams and events for the ring."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .extrapolate import available

PAGE = 4096  # what O_DIRECT wants a buffer to start at


class Cuda:
    """One GPU. Work is enqueued on streams, each in its order; across streams only events order it."""

    def __init__(self, device: str) -> None:
        """device: "cuda[:index]". Raises RuntimeError where torch sees none, or not this one."""
        reason = available()
        if reason:
            raise RuntimeError(reason)
        # An index that is not there fails here, not in the middle of a merge.
        self.device = torch.empty(0, device=device).device

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 memory of the host that the GPU reads and writes by itself, from the start of a page on."""
        memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=True)
        start = -memory.data_ptr() % PAGE
        return memory[start : start + size]

    def memory(self, size: int) -> torch.Tensor:
        """uint8 memory of the GPU."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def stream(self) -> torch.cuda.Stream:
        """A stream for memory that is allocated by now."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Memory that was freed a moment ago may still be in use there.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    def enqueue(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> None:
        """Have `work` start copies and kernels on the stream."""
        with torch.cuda.stream(stream):
            work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event that happens when what is on the stream by now is done."""
        # A thread that waits for it sleeps.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Have what is enqueued on the stream from now on wait for the event."""
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Wait for the event in this thread."""
        event.synchronize()

    def drain(self, stream: torch.cuda.Stream) -> None:
        """Wait in this thread for all that is on the stream."""
        stream.synchronize()
