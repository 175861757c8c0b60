"""Which engine computes here, and why.

An engine is a function with the contract's signature (`kernels.contract.EngineFunction`); every worker has one, and
all workers take chunks from one queue, so it does not matter for the result which engine met which chunk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import EngineError, ExpoError, UsageError
from ..kernels.contract import EngineFunction, Operand, Statistics, Term, is_extrapolation
from ..options import ENGINES
from .gpu_kernels import attempt, error_text, reason_given_up

MOST_WORKERS = 8


class Engine(NamedTuple):
    """An engine, and what it needs.

    name: as in `--engine`. run: the function. why: one phrase for the summary. gpu: a `ring.Device` to stream to.
    reserve: the engine of the CPU that takes over if the GPU fails; None where nothing may.
    note: a sentence for a warning where this engine takes the place of a GPU; "" elsewhere.
    """

    name: str
    run: EngineFunction
    why: str
    gpu: Any = None
    reserve: Engine | None = None
    note: str = ""


class UnusableGpu(EngineError):
    """A GPU that is there, whose kernels fail; device: a torch.device; reason: the error's text."""

    def __init__(self, device: Any, reason: str) -> None:
        super().__init__(f"`engine='triton'` cannot be used on {device}: {reason}; `engine='cpu'` needs no GPU")
        self.device, self.reason = device, reason


def choose(engine: str = "auto", device: str = "auto") -> Engine:
    """The engine that is asked for, or the best for the CPU.

    engine: "auto", "numpy", "cpu" or "triton"; device: "auto", "cpu" or "cuda[:index]". auto is the compiled engine,
    or NumPy where that is not built: from file to file the disk is the limit, and a GPU has nothing to add. Where
    kernels fail on a GPU that only `device` names, the CPU computes, and the engine's note says so.
    Raises UsageError for an unknown name, EngineError for an engine asked for by name that cannot run here.
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
    """Raise UsageError where it is no device's name."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"`device` must be auto, cpu or cuda[:index], got {device!r}")


def _numpy(why: str) -> Engine:
    from ..kernels import numerics

    return Engine("numpy", numerics.extrapolate, why)


def _triton(device: str) -> Engine:
    try:
        from ..kernels import device as gpu
        from ..kernels import extrapolate, host, selftest
    except Exception as error:  # a library that cannot be loaded is an OSError
        raise EngineError(f"`engine='triton'` needs torch and triton, which cannot be imported: {error}") from error
    device = "cuda" if device == "auto" else device
    try:
        stream_to = None if extrapolate.interpreted() else gpu.Cuda(device)
        engine = host.HostEngine(device)
    except Exception as error:
        reason = error_text(error)
        raise EngineError(f"`engine='triton'` cannot run here: {reason}; `engine='cpu'` needs no GPU") from error
    reason = reason_given_up(engine.device)  # by tensors in this process, for dtypes that the self-test lacks
    if reason:
        raise UnusableGpu(engine.device, reason)
    try:
        selftest.check(engine.device)
    except Exception as error:  # wrong bits, or a compiler's, of no common kind
        raise UnusableGpu(engine.device, error_text(error)) from error
    return Engine("triton", _raising_runtime_errors(engine), f"asked for, on {device}", stream_to)


def _raising_runtime_errors(engine: EngineFunction) -> EngineFunction:
    """Return the engine with Triton's errors as RuntimeErrors, which callers expect of an engine.

    An error of Triton's compiler is an Exception, and a cache folder that cannot be written to is an OSError, which
    callers would take for one of the inputs.
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
    """Return the GPU with the CPU's engine in reserve, or that engine alone if the GPU's kernels fail their test."""
    reserve = choose("auto", "cpu")
    try:
        first = _triton(device)
    except UnusableGpu as error:
        note = (
            f"the Triton kernels are not used on {error.device}; `engine={reserve.name!r}` computes instead, with the "
            f"same bits. The reason: {error.reason}"
        )
        return reserve._replace(why=f"the kernels fail on {error.device}", note=note)

    if first.gpu is None:  # Triton's interpreter
        return first

    def run(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
        arguments = anchor, terms, outputs, measure
        found: list[Statistics | None] = []
        has_kernel = is_extrapolation(anchor, terms) and "F64" not in (anchor.dtype, terms[0].minus.dtype)
        if has_kernel and attempt(first.gpu.device, lambda: found.append(first.run(*arguments))):
            return found[0]
        return reserve.run(*arguments)

    return first._replace(run=run, reserve=reserve)


def engines_for(engine: str = "auto", device: str = "auto", processes: int = 1) -> tuple[Engine, ...]:
    """An engine for each worker of a merge from file to file.

    processes: how many such merges share the processors. On the CPU one more than processors, as a worker waits while
    it writes, 8 at most. Two for a GPU: one reads while the other writes; with engine "auto" and a GPU as the device
    those of the CPU help it. Raises what choose() raises.
    """
    first = choose(engine, device)
    many = min(cpu_count() // processes + 1, MOST_WORKERS)
    if first.name != "triton":
        return (first,) * many
    alone = (first,) * (2 if first.gpu else 1)
    return alone + (choose("auto", "cpu"),) * many if engine == "auto" else alone


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
