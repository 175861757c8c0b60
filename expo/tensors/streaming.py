"""stream(): the merged tensors, one after the other; the caller owns the memory of each."""

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
from ..dtypes import TABLE, numpy_dtypes
from ..errors import UsageError
from ..execution.engines import Engine, choose
from ..execution.tensor_source import TensorSource
from ..execution.worker_pool import CHUNK
from ..inputs.resolve import StrPath, complete_request, open_inputs
from ..options import MergeOptions
from ..planning.matching import match_tensors
from ..planning.steps import Step, by_tensor, cut_steps

MakeTensor = Callable[[memoryview, TensorInfo], Any]  # returns a tensor of the framework with these bytes
# Returns a tensor for each alpha; None after a call of the last argument has returned True.
Compute = Callable[[TensorInfo, Sequence[Step], Callable[[], bool]], Any]
AHEAD = 2  # tensors that are computed ahead of the consumer


def stream(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    alpha: float | Iterable[float] | None = None,
    *,
    recipe: str | None = None,
    base: StrPath | None = None,
    adapter_over: str | None = None,
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

    The load_weights() of a serving engine takes such an iterator. Each tensor has memory of its own, which belongs to
    the consumer; at most two tensors are computed ahead of the consumer. Order, shapes and dtypes are those of
    aligned's files, unless `dtype` names another dtype. If the two tokenizers differ, a UserWarning says so. This call
    reports bad arguments and inputs before the first tensor. Closing the iterator stops the work.

    Args:
        sft: As for merge().
        aligned: As for merge().
        alpha: As for merge(). With several alphas every item is (name, tuple of tensors), with a tensor for each alpha,
            from one read of the inputs.
        recipe: As for merge().
        base: As for merge().
        adapter_over: As for merge().
        framework: "torch" for torch.Tensor, or "numpy" for numpy.ndarray, which has bf16 as ml_dtypes.bfloat16.
        to: The torch device that tensors are copied to; the CPU by default.
        alpha_for: As for merge().
        on_unpaired: As for merge().
        on_mismatch: As for merge().
        dtype: As for merge().
        engine: As for merge().
        device: As for merge().

    Raises:
        ExpoError: As for merge(), except OutputError.
    """
    if framework not in ("torch", "numpy"):
        raise UsageError(f"framework must be torch or numpy, got {framework!r}")
    if to is not None and framework != "torch":
        raise UsageError(f"to={to!r} is a device of torch, but framework is {framework!r}")
    pair = complete_request(sft, aligned, alpha, recipe, base, adapter_over)
    options = MergeOptions(pair.alphas, alpha_for or {}, on_unpaired, on_mismatch, dtype)
    chosen = choose(engine, device)
    with ExitStack() as stack:
        inputs = open_inputs(pair.sft, pair.aligned, base=pair.base, adapter_over=pair.adapter_over)
        first, second = stack.enter_context(inputs)
        matched = match_tensors(first, second, options)
        matched.check()
        note = tokens.compare(first, second)
        for text in matched.notes if note is None else (*matched.notes, note):
            warnings.warn(text, stacklevel=2)
        if chosen.note:
            warnings.warn(chosen.note, RuntimeWarning, stacklevel=2)
        several = isinstance(alpha, Iterable) and not isinstance(alpha, str)
        steps, source = matched.with_alphas(pair.alphas), TensorSource(first, second)
        compute = _computation(source, chosen, framework, to)
        return _stream(steps, compute, several, stack.pop_all())


def _computation(source: TensorSource, engine: Engine, framework: str, to: Any) -> Compute:
    """Return the function that computes a tensor for each alpha, on the device that the caller wants.

    Raises:
        UsageError: torch has no such device here.
    """
    import numpy as np

    dtypes = numpy_dtypes()

    def as_array(memory: memoryview, tensor: TensorInfo) -> Any:
        return np.frombuffer(memory, dtypes[tensor.dtype]).reshape(tensor.shape)

    if framework == "numpy":
        return _on_host(source, engine, as_array)
    import torch

    try:
        target = torch.empty(0, device=to).device
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError comes from a torch without CUDA
        raise UsageError(f"to={to!r} is no device that torch has here: {error}") from error

    if target.type == "cuda":
        from .device_stream import DeviceStream

        return DeviceStream(source, engine, target).compute

    def as_tensor(memory: memoryview, tensor: TensorInfo) -> Any:
        bits = torch.from_numpy(np.frombuffer(memory, np.uint8))  # torch does not know the dtypes of ml_dtypes
        return bits.view(getattr(torch, TABLE[tensor.dtype].torch)).view(tensor.shape).to(target)

    return _on_host(source, engine, as_tensor)


def _on_host(source: TensorSource, engine: Engine, make_tensor: MakeTensor) -> Compute:
    """Return the function that computes in memory of the host, and makes tensors of the bytes."""

    def compute(tensor: TensorInfo, own: Sequence[Step], stopped: Callable[[], bool]) -> Any:
        memories = [memoryview(bytearray(tensor.nbytes)) for _ in own[0].alphas]
        for step, start, stop, at in cut_steps(own, CHUNK):
            if stopped():
                return None
            source.compute(engine, step, start, stop, [memory[at : at + stop - start] for memory in memories])
        source.check()
        return tuple(make_tensor(memory, tensor) for memory in memories)

    return compute


def _stream(steps: Sequence[Step], compute: Compute, several: bool, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """Yield the tensors, which threads compute ahead of the consumer; `stack` closes the inputs at the end."""
    stop = threading.Event()

    def item(name: str, future: Future[Any]) -> tuple[str, Any]:
        made = future.result()
        return name, made if several else made[0]

    ahead: deque[tuple[str, Future[Any]]] = deque()
    with stack, ThreadPoolExecutor(AHEAD, thread_name_prefix="expo-stream") as pool:
        try:
            for tensor, own in by_tensor(steps):
                ahead.append((tensor.name, pool.submit(compute, tensor, own, stop.is_set)))
                if len(ahead) > AHEAD:
                    yield item(*ahead.popleft())
            while ahead:
                yield item(*ahead.popleft())
        finally:
            stop.set()
