"""The choice of the engine that computes on this machine.

An engine is a function with the contract's signature (`kernels.contract.EngineFunction`); the class `Engine` adds its
name and its devices. Every worker has one engine, and all workers take chunks from one queue. Any engine may compute
any chunk, because all engines give the same bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import EngineError, ExpoError, UsageError
from ..kernels.contract import EngineFunction, Operand, Statistics, Term, is_extrapolation
from ..options import ENGINES
from .gpu_fallback import attempt, error_text, reason_given_up

MOST_WORKERS = 8


class Engine(NamedTuple):
    """An engine with its name and its devices.

    Attributes:
        name: The name in `--engine`.
        run: The function that computes.
        why: The reason why this engine computes, as a phrase for the printed summary.
        gpu: The `gpu_lane.Device` that a GpuLane streams chunks through; None for an engine on the CPU.
        reserve: The engine of the CPU that takes over if the GPU fails; None if no engine may take over.
        note: A sentence for a warning if this engine takes the place of a GPU, else "".
        direct: True if the GPU computes in the host's memory, so that nothing needs to be streamed through it.
    """

    name: str
    run: EngineFunction
    why: str
    gpu: Any = None
    reserve: Engine | None = None
    note: str = ""
    direct: bool = False

    @property
    def streams(self) -> bool:
        """True if chunks go to a GPU and back, through the ring of a GpuLane."""
        return self.gpu is not None and not self.direct


class UnusableGpu(EngineError):
    """The kernels fail on a GPU.

    Attributes:
        device: The torch.device.
        reason: The text of the error.
    """

    def __init__(self, device: Any, reason: str) -> None:
        super().__init__(f"`engine='triton'` cannot be used on {device}: {reason}; `engine='cpu'` needs no GPU")
        self.device, self.reason = device, reason


def choose(engine: str = "auto", device: str = "auto") -> Engine:
    """Return the engine that the caller names, or the best one for the CPU.

    Args:
        engine: "auto", "numpy", "cpu" or "triton". "auto" chooses "cpu", or "numpy" if the compiled engine is not
            built: a merge from file to file is as fast as the disk, so a GPU would not help.
        device: "auto", "cpu" or "cuda[:index]". Without an index it is the current GPU of the calling thread. With
            engine "auto" a GPU computes if `device` names one; if the kernels fail there, the CPU computes, and the
            engine's note says so.

    Raises:
        UsageError: `engine` or `device` is unknown, or the two do not fit together.
        EngineError: The engine that the caller names cannot run here.
    """
    if engine not in ENGINES:
        raise UsageError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}")
    check_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu and engine in ("numpy", "cpu"):
        raise UsageError(f"`engine={engine!r}` computes on the CPU, but `device` is {device}; leave one of them out")
    if engine == "triton" and device == "cpu":
        raise UsageError("`engine='triton'` computes on a GPU, but `device` is cpu; leave one of them out")
    if engine == "triton":
        return _triton(device)
    if on_gpu:
        return _triton_or_cpu(device)
    if engine == "numpy":
        return _numpy("asked for")
    try:
        from ..kernels import cpu
    except ImportError as error:
        if engine == "cpu":
            raise EngineError(
                f"the compiled engine is not built ({error}): install a C compiler and run pip install again, "
                "or use `engine='numpy'`"
            ) from error
        return _numpy("the compiled engine is not built")
    return Engine("cpu", cpu.extrapolate, "asked for" if engine == "cpu" else "compiled, as fast as memory")


def check_device(device: str) -> None:
    """Raise UsageError if the text is not the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"`device` must be auto, cpu or cuda[:index], got {device!r}")


def _numpy(why: str) -> Engine:
    """Return the engine numpy."""
    from ..kernels import numerics

    return Engine("numpy", numerics.extrapolate, why)


def _triton(device: str) -> Engine:
    """Return the engine triton after its self-test. Raises EngineError, and UnusableGpu if the kernels fail."""
    try:
        from ..kernels import device as gpu
        from ..kernels import direct, extrapolate, host, selftest
    except Exception as error:  # a library that cannot be loaded is an OSError
        raise EngineError(f"`engine='triton'` needs torch and triton, which cannot be imported: {error}") from error
    device = "cuda" if device == "auto" else device
    try:
        if extrapolate.interpreted():
            stream_to = None
        else:
            device = gpu.resolve(device)
            stream_to = gpu.Cuda(device)
        engine = host.HostEngine(device)
    except Exception as error:
        text = error_text(error)
        raise EngineError(f"`engine='triton'` cannot run here: {text}; `engine='cpu'` needs no GPU") from error
    reason = reason_given_up(engine.device)  # a kernel may have failed for dtypes that the self-test does not use
    if reason:
        raise UnusableGpu(engine.device, reason)
    is_direct = stream_to is not None and direct.uses_host_page_tables(engine.device.index)
    run: EngineFunction = direct.DirectEngine(engine.device) if is_direct else engine
    try:
        selftest.check(engine.device)
        if is_direct:
            selftest.check_in_host_memory(run)
    except Exception as error:  # wrong bits, or an error of a compiler, which may have any type
        raise UnusableGpu(engine.device, error_text(error)) from error
    why = f"asked for, on {device}" + ", which reads and writes the host's memory" * is_direct
    return Engine("triton", _raising_runtime_errors(run), why, stream_to, direct=is_direct)


def _raising_runtime_errors(engine: EngineFunction) -> EngineFunction:
    """Return an engine that raises Triton's errors as RuntimeErrors, which callers expect of an engine.

    An error of Triton's compiler is an Exception. An error of its cache folder is an OSError, and callers would take an
    OSError for an error of the inputs.
    """

    def run(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
        try:
            return engine(anchor, terms, outputs, measure)
        except (ExpoError, RuntimeError):
            raise
        except Exception as error:
            raise RuntimeError(error_text(error)) from error

    return run


def _triton_or_cpu(device: str) -> Engine:
    """Return the engine triton with the CPU's engine as its reserve, or the reserve alone if the self-test fails."""
    reserve = choose("auto", "cpu")
    try:
        first = _triton(device)
    except UnusableGpu as error:
        return in_place_of(error, reserve)
    if first.gpu is None:  # Triton's interpreter
        return first

    def run(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
        arguments = anchor, terms, outputs, measure
        results: list[Statistics | None] = []  # one element after the kernel has run
        has_kernel = is_extrapolation(anchor, terms) and "F64" not in (anchor.dtype, terms[0].minus.dtype)
        if has_kernel and attempt(first.gpu.device, lambda: results.append(first.run(*arguments))):
            return results[0]
        return reserve.run(*arguments)

    return first._replace(run=run, reserve=reserve)


def in_place_of(gpu: UnusableGpu, reserve: Engine) -> Engine:
    """Return the reserve with a note that it computes in place of a GPU whose kernels fail."""
    note = (
        f"the Triton kernels are not used on {gpu.device}; `engine={reserve.name!r}` computes instead, with the same "
        f"bits. The reason: {gpu.reason}"
    )
    return reserve._replace(why=f"the kernels fail on {gpu.device}", note=note)


def engine_to_verify(engines: Sequence[Engine]) -> Engine:
    """Return the engine of the CPU that computes an output again to verify it.

    It is another engine than those that wrote the output, so that it also notices an engine that computes wrong bits:
    numpy if cpu was one of them, or else cpu. There are two exceptions: cpu also verifies the small pieces that it has
    computed in the lane of a GPU, and numpy verifies its own output if the compiled engine is not built.

    Args:
        engines: The engines that wrote the output.
    """
    names = {each.name for engine in engines for each in (engine, engine.reserve) if each is not None}
    return choose("numpy" if "cpu" in names else "auto", "cpu")


def engines_for(engine: str = "auto", device: str = "auto", processes: int = 1) -> tuple[Engine, ...]:
    """Return an engine for each worker of a merge from file to file.

    The CPU has one worker more than it has processors, because a worker waits while it writes, and at most
    MOST_WORKERS. A GPU has as many workers as there are processors, at least two and at most MOST_WORKERS: a worker
    reads, waits for the GPU and writes, and the bus to the GPU is faster than the reads and writes of a few workers.
    With engine "auto" and a GPU as the device, the workers of the CPU compute beside those of the GPU.

    Args:
        engine: As in `choose`.
        device: As in `choose`.
        processes: The number of merges that share the processors.

    Raises:
        UsageError: As in `choose`.
        EngineError: As in `choose`.
    """
    first = choose(engine, device)
    processors = cpu_count() // processes
    cpu_workers = min(processors + 1, MOST_WORKERS)
    if first.name != "triton":
        return (first,) * cpu_workers
    on_gpu = (first,) * (max(2, min(processors, MOST_WORKERS)) if first.gpu else 1)
    return on_gpu + (choose("auto", "cpu"),) * cpu_workers if engine == "auto" else on_gpu


def cpu_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
