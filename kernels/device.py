"""All code that needs CUDA or ROCm: memory, streams and events of a GPU, for a lane that streams chunks through it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .extrapolate import why_unavailable
from .pinned import pinned


def resolve(device: str) -> str:
    """Return the GPU that a name means in the calling thread, as "cuda:index".

    torch has a current GPU for each thread, so the name "cuda" may mean another GPU in a thread that starts later.

    Args:
        device: "cuda", which means the current GPU of the calling thread, or "cuda:index".

    Raises:
        RuntimeError: torch sees no GPU.
    """
    reason = why_unavailable()
    if reason:
        raise RuntimeError(reason)
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


class Cuda:
    """One GPU.

    The work on a stream is done in the order in which it was enqueued; between streams only events fix an order.
    """

    def __init__(self, device: str) -> None:
        """Find the GPU.

        Args:
            device: "cuda:index", as `resolve` returns it.

        Raises:
            RuntimeError: torch sees no GPU of that index.
        """
        # If no GPU has this index, the error comes here and not in the middle of a merge.
        self.device = torch.empty(0, device=device).device

    def pinned(self, size: int) -> torch.Tensor:
        """Return `size` bytes of the host's memory, pinned, so that the GPU can access them, and aligned to a page."""
        return pinned(size, [self.device])

    def memory(self, size: int) -> torch.Tensor:
        """Return `size` bytes of the GPU's memory, as a uint8 tensor."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def stream(self) -> torch.cuda.Stream:
        """Return a new stream for work on memory that is allocated before this call."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Work on the current stream may still use the memory of a tensor that was freed a moment ago.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    def enqueue(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> None:
        """Call `work`, and put the copies and kernels that it starts on the stream."""
        with torch.cuda.stream(stream):
            work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Return an event that completes when all work that is on the stream now is done."""
        # A thread that waits for a blocking event sleeps.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Make later work on the stream wait for the event."""
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Wait for the event in this thread."""
        event.synchronize()

    def drain(self, stream: torch.cuda.Stream) -> None:
        """Wait in this thread for all work on the stream."""
        stream.synchronize()
