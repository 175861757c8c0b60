"""stream(): the merged tensors, one by one, into the caller's memory."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from ..checkpoints import tokenizer as tokens
from ..checkpoints.safetensors_header import TensorInfo
from ..errors import UsageError
from ..execution.engines import Engine, choose
from ..execution.tensor_source import TensorSource
from ..execution.worker_pool import CHUNK
from ..inputs.resolve import StrPath, complete_request, open_inputs
from ..options import MergeOptions
from ..planning.matching import match_tensors
from ..planning.steps import Step, by_tensor

Wrapper = Callable[[memoryview, TensorInfo], Any]
AHEAD = 2  # tensors computed ahead of the consumer


def stream(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    alpha: float | Iterable[float] | None = None,
    *,
    recipe: str | None = None,
    framework: str = "torch",
    to: Any = None,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    engine: str = "auto",
    device: str = "auto",
) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) for every tensor of the merged model; nothing is written.

    The arguments mean what they mean for merge(). With several alphas every item is (name, tuple of tensors), one for
    each, from one read of the inputs. framework: "torch" for torch.Tensor, or "numpy" for numpy.ndarray (bf16 as
    ml_dtypes.bfloat16). to: the torch device that tensors are copied to; the CPU by default. Shapes are aligned's, and
    dtypes too unless `dtype` says otherwise; the order is that of aligned's files. Where the two tokenizers differ, a
    UserWarning says so.
    Each tensor is memory of the consumer's own; at most two are computed ahead of the one that is consumed. So it is
    what a serving engine's load_weights() takes.
    Bad arguments and inputs are reported by this call, before the first tensor; closing the iterator stops the work.
    Raises what merge() raises, OutputError apart.
    """
    if framework not in ("torch", "numpy"):
        raise UsageError(f"framework must be torch or numpy, got {framework!r}")
    if to is not None and framework != "torch":
        raise UsageError(f"to={to!r} is a device of torch, but framework is {framework!r}")
    pair = complete_request(sft, aligned, alpha, recipe)
    options = MergeOptions(pair.alphas, alpha_for or {}, on_unpaired, on_mismatch, dtype)
    chosen = choose(engine, device)
    with ExitStack() as stack:
        first, second = stack.enter_context(open_inputs(pair.sft, pair.aligned))
        matched = match_tensors(first, second, options)
        matched.check()
        note = tokens.compare(first, second)
        for text in matched.notes if note is None else (*matched.notes, note):
            warnings.warn(text, stacklevel=2)
        if chosen.note:
            warnings.warn(chosen.note, RuntimeWarning, stacklevel=2)
        several = isinstance(alpha, Iterable) and not isinstance(alpha, str)
        steps, source = matched.at(pair.alphas), TensorSource(first, second)
        return _stream(steps, source, chosen, _wrapper(framework, to), several, stack.pop_all())


def _wrapper(framework: str, to: Any) -> Wrapper:
    """A function that makes bytes the framework's tensor, without a copy but that to a device. Raises UsageError."""
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

    try:
        there = torch.empty(0, device=to).device
    except (RuntimeError, TypeError, AssertionError) as error:  # the last: torch built without CUDA
        raise UsageError(f"to={to!r} is no device that torch has here: {error}") from error

    def as_tensor(memory: memoryview, tensor: TensorInfo) -> Any:
        if tensor.dtype == "BF16":  # torch does not know ml_dtypes
            bits = np.frombuffer(memory, np.int16).reshape(tensor.shape)
            return torch.from_numpy(bits).view(torch.bfloat16).to(there)
        return torch.from_numpy(as_array(memory, tensor)).to(there)

    return as_tensor


def _stream(
    steps: Sequence[Step], source: TensorSource, engine: Engine, wrap: Wrapper, several: bool, stack: ExitStack
) -> Iterator[tuple[str, Any]]:
    stop = threading.Event()

    def compute(tensor: TensorInfo, own: list[Step]) -> Any:
        memories = [memoryview(bytearray(tensor.nbytes)) for _ in own[0].alphas]
        at = 0
        for step in own:
            for start in range(0, step.nbytes, CHUNK):
                if stop.is_set():
                    return None
                end = min(start + CHUNK, step.nbytes)
                outs = [memory[at + start : at + end] for memory in memories]
                source.compute(engine, step, start, end, outs)
            at += step.nbytes
        source.check()
        wrapped = tuple(wrap(memory, tensor) for memory in memories)
        return wrapped if several else wrapped[0]

    ahead: deque[tuple[str, Future[Any]]] = deque()
    with stack, ThreadPoolExecutor(AHEAD, thread_name_prefix="expo-stream") as pool:
        try:
            for tensor, own in by_tensor(steps):
                ahead.append((tensor.name, pool.submit(compute, tensor, own)))
                if len(ahead) > AHEAD:
                    name, future = ahead.popleft()
                    yield name, future.result()
            while ahead:
                name, future = ahead.popleft()
                yield name, future.result()
        finally:
            stop.set()
