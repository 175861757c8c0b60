"""stream(): the merged tensors, one by one, into the caller's memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

from .checkpoint import open_checkpoint
from .engines import Engine, choose
from .errors import UsageError
from .header import TensorInfo
from .pipeline import StrPath, alphas_of
from .plan import Plan, Step, make_plan
from .work import CHUNK, Source

Wrapper = Callable[[memoryview, TensorInfo], Any]
AHEAD = 2  # tensors computed ahead of the consumer


def stream(
    sft: StrPath,
    aligned: StrPath,
    alpha: float,
    *,
    framework: str = "torch",
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    engine: str = "auto",
    device: str = "auto",
) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) for every tensor of the merged model; nothing is written.

    The arguments mean what they mean for merge(). framework: "torch" for torch.Tensor on the CPU, or "numpy" for
    numpy.ndarray (bf16 as ml_dtypes.bfloat16). Shapes and dtypes are aligned's, the order is that of aligned's files.
    Each tensor is memory of the consumer's own; at most two are computed ahead of the one that is consumed.
    Bad arguments and inputs are reported by this call, before the first tensor; closing the iterator stops the work.
    Raises what merge() raises, OutputError apart.
    """
    if framework not in ("torch", "numpy"):
        raise UsageError(f"framework must be torch or numpy, got {framework!r}")
    alphas = alphas_of(alpha)
    if len(alphas) != 1:
        raise UsageError(f"stream() takes one alpha, got {alpha!r}")
    chosen = choose(engine, device)
    stack = ExitStack()
    with stack:
        weak = stack.enter_context(closing(open_checkpoint(sft)))
        strong = stack.enter_context(closing(open_checkpoint(aligned)))
        plan = make_plan(weak, strong, alphas, alpha_for, on_unpaired, on_mismatch)
        plan.check()
        return _stream(plan, Source(weak, strong), chosen, _wrapper(framework), stack.pop_all())


def _wrapper(framework: str) -> Wrapper:
    """A function that makes bytes the framework's tensor, without a copy."""
    import ml_dtypes
    import numpy as np

    kinds: dict[str, Any] = {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64,
    }  # fmt: skip

    def as_array(memory: memoryview, tensor: TensorInfo) -> Any:
        return np.frombuffer(memory, kinds[tensor.dtype]).reshape(tensor.shape)

    if framework == "numpy":
        return as_array
    import torch

    def as_tensor(memory: memoryview, tensor: TensorInfo) -> Any:
        if tensor.dtype == "BF16":  # torch does not know ml_dtypes
            bits = np.frombuffer(memory, np.int16).reshape(tensor.shape)
            return torch.from_numpy(bits).view(torch.bfloat16)
        return torch.from_numpy(as_array(memory, tensor))

    return as_tensor


def _stream(plan: Plan, source: Source, engine: Engine, wrap: Wrapper, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    stop = threading.Event()

    def compute(step: Step) -> Any:
        memory = memoryview(bytearray(step.aligned.nbytes))
        for start in range(0, len(memory), CHUNK):
            if stop.is_set():
                return None
            end = min(start + CHUNK, len(memory))
            source.compute(engine, step, start, end, [memory[start:end]])
        source.check()
        return wrap(memory, step.aligned)

    ahead: deque[tuple[str, Future[Any]]] = deque()
    with stack, ThreadPoolExecutor(AHEAD, thread_name_prefix="expo-stream") as pool:
        try:
            for step in plan.steps:
                ahead.append((step.name, pool.submit(compute, step)))
                if len(ahead) > AHEAD:
                    name, future = ahead.popleft()
                    yield name, future.result()
            while ahead:
                name, future = ahead.popleft()
                yield name, future.result()
        finally:
            stop.set()
