"""Make the lane that fits a worker's engine: on the CPU, on a GPU, or on a GPU with an engine of the CPU in reserve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .engines import Engine, UnusableGpu, in_place_of
from .gpu_fallback import error_text
from .lanes import CpuLane, Lane, ring_slots
from .tensor_source import TensorSource

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from .gpu_lane import GpuLane


def compile_kernels(engines: Sequence[Engine], plan: Plan) -> tuple[Engine, ...]:
    """Compile the kernels that the lanes of these engines launch for a plan, in this thread, once for each GPU.

    A merge calls this function before it stages an output. Otherwise the lanes would compile the kernels, and an error
    of a compiler would leave an unfinished output.

    Args:
        engines: One engine for each worker, as `engines_for` returns them.
        plan: The plan.

    Returns:
        The engines. If the kernels fail on a GPU whose engine has a reserve, the reserve takes the place of the engines
        of the CPU, and has a note.

    Raises:
        EngineError: The kernels fail on a GPU whose engine has no reserve, because the user named it.
    """
    for device, engine in {each.gpu.device: each for each in engines if each.gpu is not None}.items():
        from . import gpu_lane

        try:
            gpu_lane.compile_kernels(device, plan, engine.run if engine.direct else None)
        except Exception as error:  # errors of compilers and of the system's programs have no common base class
            unusable = UnusableGpu(device, error_text(error))
            if engine.reserve is None:
                raise unusable from error
            workers = sum(each.gpu is None for each in engines)
            return (in_place_of(unusable, engine.reserve),) * max(workers, 1)
    return tuple(engines)


class LaneMaker:
    """A maker of lanes for the workers of one pass over a plan.

    Attributes:
        notes: Warnings about GPUs that failed, in order, each once. The values of the dictionary mean nothing.
    """

    def __init__(
        self, engines: Sequence[Engine], plan: Plan, source: TensorSource, chunk_bytes: int, measure: bool
    ) -> None:
        """Keep what all lanes share.

        Args:
            engines: One engine for each worker.
            plan: The plan whose chunks the lanes compute.
            source: The bytes of both inputs.
            chunk_bytes: The size of the largest chunk in bytes.
            measure: True to measure the statistics of every piece.
        """
        self._slots = ring_slots(engines)
        self._plan, self._source = plan, source
        self._chunk_bytes, self._measure = chunk_bytes, measure
        self.notes: dict[str, None] = {}

    def __call__(self, engine: Engine) -> Lane:
        """Return a new lane for a worker with this engine."""
        if not engine.streams:
            return self._on_cpu(engine)
        if engine.reserve is None:
            return self._on_gpu(engine)
        from .fallback_lane import FallbackLane

        reserve, device = engine.reserve, engine.gpu.device

        def report(reason: str) -> None:
            self.notes[
                f"{device} failed, and `engine={reserve.name!r}` computed its part of the output, with the same bits. "
                f"The reason: {reason}"
            ] = None

        return FallbackLane(lambda: self._on_gpu(engine), self._slots, self._on_cpu(reserve), reserve.name, report)

    def _on_cpu(self, engine: Engine) -> CpuLane:
        return CpuLane(engine, self._source, len(self._plan.alphas), self._chunk_bytes, self._measure)

    def _on_gpu(self, engine: Engine) -> GpuLane:
        from .gpu_lane import GpuLane

        return GpuLane(engine.gpu, self._plan, self._source, self._chunk_bytes, self._measure, self._slots)
