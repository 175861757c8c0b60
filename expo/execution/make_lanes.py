"""The lanes of a merge's workers: which lane an engine has, and what takes over where a GPU fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..planning.plan import Plan
from .engines import Engine
from .lanes import CpuLane, Lane
from .tensor_source import TensorSource

if TYPE_CHECKING:
    from .gpu_lane import GpuLane


class LaneMaker:
    """Makes the lane of each worker of one pass over a plan.

    Attributes:
        notes: Sentences for warnings about GPUs that failed, in order, each once.
    """

    def __init__(self, plan: Plan, source: TensorSource, chunk_bytes: int, measure: bool) -> None:
        self._plan, self._source = plan, source
        self._chunk_bytes, self._measure = chunk_bytes, measure
        self.notes: dict[str, None] = {}

    def __call__(self, engine: Engine) -> Lane:
        """Return a new lane for a worker with this engine."""
        if engine.gpu is None:
            return self._on_cpu(engine)
        if engine.reserve is None:
            return self._on_gpu(engine)
        from .fallback_lane import FallbackLane

        reserve, device = engine.reserve, engine.gpu.device

        def report(reason: str) -> None:
            note = (
                f"{device} failed, and `engine={reserve.name!r}` did its part, with the same bits. The reason: {reason}"
            )
            self.notes[note] = None

        return FallbackLane(lambda: self._on_gpu(engine), self._on_cpu(reserve), reserve.name, report)

    def _on_cpu(self, engine: Engine) -> CpuLane:
        return CpuLane(engine, self._source, len(self._plan.alphas), self._chunk_bytes, self._measure)

    def _on_gpu(self, engine: Engine) -> GpuLane:
        from .gpu_lane import GpuLane

        return GpuLane(engine.gpu, self._plan, self._source, self._chunk_bytes, self._measure)
