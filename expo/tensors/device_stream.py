"""The tensors of a stream that the consumer wants on a GPU: uploads overlap with reading, and nothing is downloaded.

A thread has two slots of pinned memory. It reads inputs into one slot, or computes there on the CPU, while the other
slot is uploaded. Bytes moved over the bus for each output: sft and aligned if the GPU computes, else the output alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch

from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import TABLE, torch_dtypes
from ..errors import EngineError
from ..execution.engines import Engine
from ..execution.gpu_fallback import error_text, has_kernel
from ..execution.tensor_source import TensorSource
from ..execution.worker_pool import CHUNK
from ..kernels.pinned import pinned
from ..planning.steps import Step, cut_steps
from . import gpu_tensors


class Slot:
    """Pinned memory, and the event after its last upload."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._memories: list[torch.Tensor] = []

    def wait(self) -> None:
        """Wait in this thread until the slot's last upload is done."""
        self.event.synchronize()

    def memory(self, number: int, size: int) -> torch.Tensor:
        """Return `size` bytes of the slot's pinned memory with this number."""
        while len(self._memories) <= number:
            self._memories.append(torch.empty(0, dtype=torch.uint8))
        if self._memories[number].numel() < size:
            self._memories[number] = pinned(max(size, CHUNK), [self._device])
        return self._memories[number][:size]


class DeviceStream:
    """The computation of whole tensors on a GPU; several threads may use it."""

    def __init__(self, source: TensorSource, engine: Engine, device: torch.device) -> None:
        """Take the inputs, the engine and the device that the tensors are wanted on."""
        self._source, self._engine, self._device = source, engine, device
        self._computes = engine.gpu is not None and engine.gpu.device == device
        self._local = threading.local()

    def compute(self, tensor: TensorInfo, steps: Sequence[Step], stopped: Callable[[], bool]) -> Any:
        """Return a tensor for each alpha, complete, in memory of the thread's current stream; None if stopped.

        Raises:
            EngineError: An engine that was asked for by name failed.
            CheckpointError: An input cannot be read, or has changed.
        """
        with torch.cuda.device(self._device):
            outs = [
                torch.empty(tensor.shape, dtype=getattr(torch, TABLE[tensor.dtype].torch), device=self._device)
                for _ in steps[0].alphas
            ]
            stream, slots = self._stream_and_slots()
            stream.wait_stream(torch.cuda.current_stream())  # which may still use the memory of outs
            flat = [out.view(-1).view(torch.uint8) for out in outs]
            try:
                for (step, start, stop, at), slot in zip(cut_steps(steps, CHUNK), cycle(slots), strict=False):
                    if stopped():
                        return None
                    slot.wait()
                    self._fill(stream, slot, step, start, stop, [each[at : at + stop - start] for each in flat])
                    slot.event.record(stream)
            finally:
                stream.synchronize()  # torch may give the memory of outs to others at once
        self._source.check()
        return tuple(outs)

    def _stream_and_slots(self) -> tuple[Any, list[Slot]]:
        """Return this thread's stream and slots."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._local.slots = [Slot(self._device), Slot(self._device)]
        return self._local.stream, self._local.slots

    def _fill(self, stream: Any, slot: Slot, step: Step, start: int, stop: int, outs: Sequence[torch.Tensor]) -> None:
        """Enqueue the uploads and kernels for bytes [start, stop) of a step's outputs."""
        if not (self._computes and has_kernel(step)):
            hosts = [slot.memory(k, stop - start) for k in range(len(outs))]
            self._source.compute(self._engine, step, start, stop, [host.numpy().data for host in hosts])
            with torch.cuda.stream(stream):
                for out, host in zip(outs, hosts, strict=True):
                    out.copy_(host, non_blocking=True)
            return
        hosts = []
        for number, span in enumerate(self._source.spans(step, start, stop)):
            hosts.append(slot.memory(number, span.stop - span.start))
            span.reader.read(span.start, hosts[-1].numpy().data)
        with torch.cuda.stream(stream):
            aligned, sft = (host.to(self._device, non_blocking=True) for host in hosts)
            for alpha, out in zip(step.alphas, outs, strict=True):
                if alpha:
                    self._extrapolate(step, sft, aligned, alpha, out)
                else:
                    out.copy_(aligned)

    def _extrapolate(
        self, step: Step, sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor
    ) -> None:
        """Launch the kernel for bytes of a step; torch computes instead if no engine was asked for by name."""
        assert step.sft is not None
        dtype = torch_dtypes()[step.aligned.dtype]
        s, a, o = sft.view(torch_dtypes()[step.sft.dtype]), aligned.view(dtype), out.view(dtype)
        if self._engine.reserve is not None:
            gpu_tensors.compute(s, a, alpha, o)
            return
        from ..kernels import extrapolate

        try:
            extrapolate.launch_tensors(s, a, alpha, o)
        except Exception as error:  # an error of a compiler may have any type
            raise EngineError(f"`engine='triton'` failed on {step.name}: {error_text(error)}") from error
