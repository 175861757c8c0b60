"""Define the lane on a GPU that has an engine of the CPU in reserve, so that a GPU's failure does not end a merge."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ..errors import ExpoError
from ..planning.shards import Chunk
from .gpu_fallback import error_text
from .lanes import ComputedChunk, Lane

T = TypeVar("T")


class FallbackLane:
    """A lane on a GPU; after a failure of the GPU, the reserve computes the chunks."""

    def __init__(
        self, make_gpu: Callable[[], Lane], depth: int, reserve: Lane, name: str, report: Callable[[str], None]
    ) -> None:
        """Make the GPU's lane.

        Args:
            make_gpu: Returns the GPU's lane; if this call fails, the reserve computes every chunk.
            depth: The depth of the GPU's lane.
            reserve: The lane on the CPU that computes after a failure.
            name: The name of the reserve's engine.
            report: Takes the text of the GPU's error.
        """
        self.depth = depth
        self._reserve, self._name, self._report = reserve, name, report
        self._chunks: deque[Chunk] = deque()  # chunks that are begun and not finished
        self._gpu: Lane | None = None
        self._gpu = self._try_gpu(make_gpu)

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk on the GPU; after a failure, `finish` computes it."""
        self._chunks.append(chunk)
        if self._gpu is not None:
            lane = self._gpu
            self._try_gpu(lambda: lane.begin(chunk))

    def finish(self) -> ComputedChunk:
        """Return the chunk that was begun first; the reserve computes it if the GPU failed."""
        computed = self._try_gpu(self._gpu.finish) if self._gpu is not None else None
        chunk = self._chunks.popleft()
        if computed is not None:
            return computed
        self._reserve.begin(chunk)
        computed = self._reserve.finish()
        return computed._replace(others={self._name: (chunk.stop - chunk.start) * len(computed.buffers)})

    def close(self) -> None:
        """Close the GPU's lane. A failure is reported and not raised, because every chunk is finished or abandoned."""
        lane, self._gpu = self._gpu, None
        if lane is not None:
            self._try_gpu(lane.close)

    def _try_gpu(self, work: Callable[[], T]) -> T | None:
        """Return the result of the GPU's work; after a failure close the GPU's lane, report, and return None."""
        try:
            return work()
        except (ExpoError, OSError):  # an error of an input, with which the reserve would fail too
            raise
        except Exception as error:
            lane, self._gpu = self._gpu, None
            if lane is not None:
                with contextlib.suppress(Exception):  # a GPU that failed may fail again
                    lane.close()
            self._report(error_text(error))
            return None
