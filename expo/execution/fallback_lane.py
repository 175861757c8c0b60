"""A lane through a GPU with an engine of the CPU in reserve: a GPU that fails does not end a merge."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ..errors import ExpoError
from ..planning.shards import Chunk
from .gpu_kernels import error_text
from .worker_pool import RING_SLOTS, Lane, Result

T = TypeVar("T")


class LaneWithReserve:
    """A lane (see `work.Lane`) through a GPU; from the GPU's failure on, the reserve computes its chunks."""

    depth = RING_SLOTS

    def __init__(self, make: Callable[[], Lane], reserve: Lane, name: str, failed: Callable[[str], None]) -> None:
        """Make the GPU's lane, which may fail too; name: of the reserve; failed: takes the text of the GPU's error."""
        self._reserve, self._name, self._failed = reserve, name, failed
        self._chunks: deque[Chunk] = deque()  # begun and not finished
        self._gpu: Lane | None = None
        self._gpu = self._try(make)

    def begin(self, chunk: Chunk) -> None:
        """Start a chunk on the GPU; without the GPU it is computed when it is finished."""
        self._chunks.append(chunk)
        if self._gpu is not None:
            lane = self._gpu
            self._try(lambda: lane.begin(chunk))

    def finish(self) -> Result:
        """Return the chunk begun first, done again if the GPU had begun it and failed."""
        result = self._try(self._gpu.finish) if self._gpu is not None else None
        chunk = self._chunks.popleft()
        if result is not None:
            return result
        self._reserve.begin(chunk)
        return self._reserve.finish()._replace(engine=self._name)

    def close(self) -> None:
        """Wait for the GPU."""
        if self._gpu is not None:
            self._gpu.close()

    def _try(self, work: Callable[[], T]) -> T | None:
        """Have the GPU do something; if it fails, let go of it, say so, and return None."""
        try:
            return work()
        except (ExpoError, OSError):  # of the inputs
            raise
        except Exception as error:
            lane, self._gpu = self._gpu, None
            if lane is not None:
                with contextlib.suppress(Exception):  # a GPU that failed may fail again
                    lane.close()
            self._failed(error_text(error))
            return None
