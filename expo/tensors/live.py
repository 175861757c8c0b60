"""Live: a model in memory whose alpha can be set again and again, each time in one pass over its weights.

    weights = aligned + alpha * (aligned - sft)

The weights get the bits that merged files would have: the same matching pairs the tensors, and the same engines
compute. The weights are those that the model's files hold, its parameters and its persistent buffers. Setting an alpha
overwrites them, so both originals stay beside the model. Bytes moved for one alpha: both originals are read and the
weights are written, once.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..dtypes import torch_names
from ..errors import EngineError, UsageError
from ..execution.engines import cpu_count
from ..inputs.locations import StrPath
from ..kernels.contract import Address, Operand, working_alpha
from ..options import MergeOptions
from . import gpu_tensors
from .arrays import MOST_THREADS, compute_on_cpu
from .distributed_tensors import fsdp_modules, local_part, reshard
from .model_weights import MOVED, WeightPositions, model_tensors, saved_weights
from .originals import (
    KEEP,
    LiveWeight,
    keep_originals,
    local_steps,
    read_parts,
)
from .sft_tensors import open_sft
from .versions import count_writes

CPU_ELEMENTS = 1 << 21  # elements that a thread of the CPU computes at a time
DEVICE_ELEMENTS = 1 << 24  # elements of originals that go to a device at a time
NOT_CAPTURED = (
    "a CUDA graph is being captured, and only a tensor that was set before the capture can be set in it: keep the "
    "originals on the GPU that has all weights, set alpha to a tensor of one float32 there, then capture the same again"
)


class Live:
    """A model whose weights are aligned + alpha * (aligned - sft) for the alpha that is set.

    `live.alpha = 0.4` rewrites the parameters in place, and the floating-point buffers that the model's files hold,
    such as a router's bias; `live.alpha = 0` restores aligned. A tied weight is rewritten once. Integers stay as they
    are, and so do buffers that are not saved or that the model computes, such as rotary frequencies. As a context
    manager, Live restores aligned at the end and releases the originals. One thread may use it, while nothing else uses
    the model.

    A CUDA graph can capture `live.alpha = tensor`, for a tensor of one float32 on the GPU that has all weights. The
    GPU reads the number at each replay, so `tensor.fill_(0.5)` before a replay gives the weights of alpha 0.5.

    Attributes:
        memory: Bytes that the originals take, on the device, in memory or on the disk.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sft: torch.nn.Module | StrPath,
        *,
        keep: str = "device",
        base: StrPath | None = None,
        alpha_for: Mapping[str, float] | None = None,
        on_unpaired: str = "error",
        on_mismatch: str = "error",
    ) -> None:
        """Match the tensors of both models and keep the originals.

        Args:
            model: The model with the aligned weights, of dtype bf16, fp16, fp32 or fp64, on one or several devices. If
                it has DTensors, each process sets its own part of them.
            sft: Another model of the same kind, or a folder, a file or a hub id as for merge(). The DTensors of two
                models have the same meshes and placements.
            keep: The place of the originals: the "device" of each weight, the "host"'s memory, or the "disk", in an
                unnamed temporary file (TMPDIR says where). They take the bytes of both models. With "device" a model
                given as sft is used where it is, and must not change meanwhile.
            base: The checkpoint under sft, if that is a LoRA adapter, in the forms of `sft`. Live then takes the
                weights that a merge of the base and the adapter at alpha 0 writes.
            alpha_for, on_unpaired, on_mismatch: As for merge(). If they leave most of the weights as aligned has them,
                a UserWarning says so.

        Raises:
            UsageError: An argument makes no sense, or a weight cannot be rewritten in place.
            CheckpointError: sft's files cannot be read.
            PlanError: The two models cannot be merged.
            EngineError: The place has too little memory for the originals.
        """
        if keep not in KEEP:
            raise UsageError(f"`keep` must be one of {', '.join(KEEP)}, got {keep!r}")
        if base is not None and isinstance(sft, torch.nn.Module):
            raise UsageError("`base` is for an adapter in files, but sft is a model in memory")
        self._fsdp_modules = fsdp_modules(model)
        reshard(self._fsdp_modules)
        aligned = model_tensors(model, "model")
        options = MergeOptions(alpha_for=alpha_for or {}, on_unpaired=on_unpaired, on_mismatch=on_mismatch)
        with ExitStack() as stack:
            others = open_sft(stack, sft, model, aligned, options, base)
            for note in others.matched.notes:
                warnings.warn(note, stacklevel=2)
            weights = saved_weights(model)
            extrapolated = [step for step in others.matched.steps if step.sft is not None]
            steps, parts = local_steps(extrapolated, weights, others.weights)
            local = {name: local_part(tensor) for name, tensor in weights.items()}
            usable = others.local if keep == "device" else {}
            self._weights, self.memory = keep_originals(steps, local, read_parts(others.read, parts), keep, usable)
        self._positions = WeightPositions(model, {step.name for step in steps})
        self._jobs = [job for weight in self._weights if _on_cpu(weight) for job in _make_jobs(weight)]
        self._threads = min(cpu_count(), MOST_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expo-live")
        self._on_device = keep == "device"
        self._groups = _make_groups(self._weights, self._on_device)
        self._has_gpu = torch.cuda.is_available() and any(group.device.type == "cuda" for group in self._groups)
        self._tables: dict[_Group, Any] = {}
        self._alpha: float | torch.Tensor | None = 0.0
        self._closed = False

    @property
    def alpha(self) -> float | torch.Tensor | None:
        """The alpha that is set, or the tensor that holds it; None after a failure while the weights were rewritten."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | torch.Tensor) -> None:
        """Rewrite the weights.

        Args:
            value: A number that is finite in fp32, or a tensor of one float32 on the GPU that has all weights. The
                host does not read such a tensor, so nothing checks its number.

        Raises:
            UsageError: The value is not usable, the model was moved, or a graph is captured that cannot repeat this.
            EngineError: The GPU's kernels cannot be used, and the alpha is in a tensor.
        """
        in_memory = self._reads(value)
        if self._closed:
            raise UsageError("this Live is closed: create another one")
        self._check_capture(value, in_memory)
        if not in_memory:
            value = _number(value)
        tensors, written = self._positions.read()
        if self._fsdp_modules:  # some tensors are whole copies, which autograd may have saved in a forward pass
            reshard(self._fsdp_modules)
            tensors, also_written = self._positions.read()
            written += also_written
        if self._positions.changed(tensors):
            raise UsageError(MOVED)
        self._alpha = None
        count_writes(torch, written)
        if isinstance(value, float) and value == 0:
            for weight in self._weights:
                weight.out.copy_(weight.aligned)
        else:
            self._compute_on_devices(value)
            self._run_jobs(value)
        self._alpha = value

    def _reads(self, value: Any) -> bool:
        """Return True if the kernels read alpha in this tensor: all weights are on its GPU and share launches."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.numel() != 1:
            return False
        on_its_device = all(group.shares_a_launch and group.device == value.device for group in self._groups)
        return gpu_tensors.on_gpu(value) and on_its_device and not self._jobs

    def _check_capture(self, value: Any, in_memory: bool) -> None:
        """Raise UsageError if a CUDA graph is being captured whose replay could not repeat this launch."""
        if not (self._has_gpu and torch.cuda.is_current_stream_capturing()):
            return
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor and not (in_memory and self._alpha is value):
            raise UsageError(NOT_CAPTURED)
        if not self._on_device or self._jobs:
            raise UsageError(
                "a CUDA graph cannot capture work of the host: keep the originals on the GPU of all weights"
            )

    def _run_jobs(self, value: float | torch.Tensor) -> None:
        """Compute all jobs in several threads; each thread takes the next job when it is free."""
        if isinstance(value, torch.Tensor) or not self._jobs:
            return
        queue = iter(self._jobs)

        def work(_: int) -> None:
            for job in queue:
                job(value)

        list(self._pool.map(work, range(self._threads)))

    def _compute_on_devices(self, value: float | torch.Tensor) -> None:
        """Compute all weights that are not on the CPU; those of one device and alpha share a launch if they can."""
        for group, weights in self._groups.items():
            alpha = value if group.alpha is None else group.alpha
            if isinstance(alpha, torch.Tensor):
                self._launch_with(alpha, group, weights)
                continue
            used_alpha = working_alpha(alpha)
            table = self._table(group, weights) if group.shares_a_launch and used_alpha else None
            if table is not None:
                gpu_tensors.compute_table(table, used_alpha, partial(_tensors_at, weights))
                continue
            for weight in weights:
                _compute_in_parts(weight, working_alpha(alpha, *weight.dtypes))

    def _launch_with(self, alpha: torch.Tensor, group: _Group, weights: Sequence[LiveWeight]) -> None:
        """Compute a group's weights with the alpha in a tensor on their GPU. Raises EngineError if that fails."""
        table = self._table(group, weights)
        if table is None:
            raise EngineError(f"{group.device} has no memory for a table of addresses: set a number as alpha")
        gpu_tensors.launch_table(table, alpha)

    def _table(self, group: _Group, weights: Sequence[LiveWeight]) -> Any:
        """Return the pointer table of a group's weights, cached for later launches; None if none can be made now."""
        if group not in self._tables:
            made = gpu_tensors.make_table((weight.sft, weight.aligned, weight.out) for weight in weights)
            if made is None:  # memory may have run out, so the next call tries again
                return None
            self._tables[group] = made
        return self._tables[group]

    def close(self) -> None:
        """Restore aligned and release the originals and the tables; a second call does nothing.

        Raises:
            UsageError: The model was moved, so aligned is not restored. The memory is released all the same.
        """
        try:
            if not self._closed:
                self.alpha = 0.0
        finally:
            self._closed = True
            self._pool.shutdown()
            self._weights, self._jobs, self._groups, self._tables, self.memory = [], [], {}, {}, 0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _number(value: Any) -> float:
    """Return the value as a float. Raises UsageError unless it is a number that is finite in fp32."""
    try:
        working_alpha(value)
        return float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"alpha must be a number that is finite in float32, got {value!r}") from error


def _tensors_at(weights: Sequence[LiveWeight], place: int) -> tuple[Any, Any, Any]:
    """Return the tensors (sft, aligned, out) of the weight at a position."""
    return weights[place].sft, weights[place].aligned, weights[place].out


def _on_cpu(weight: LiveWeight) -> bool:
    """Return True for a weight that threads of the CPU compute."""
    return weight.out.device.type == "cpu"


def _compute_in_parts(weight: LiveWeight, alpha: float) -> None:
    """Compute one tensor in parts, whose originals are copied to the device first if they are elsewhere."""
    columns = (torch.split(each.reshape(-1), DEVICE_ELEMENTS) for each in (weight.sft, weight.aligned, weight.out))
    for sft, aligned, out in zip(*columns, strict=True):
        s, a = (each.to(out.device, non_blocking=True) for each in (sft, aligned))
        if alpha:
            gpu_tensors.compute(s, a, alpha, out)
        else:
            out.copy_(a)


class _Group(NamedTuple):
    """Weights on one device, not the CPU, that share an alpha.

    Attributes:
        device: The device.
        alpha: The weights' own alpha; None for the alpha of the model.
        shares_a_launch: True if one launch of the kernel can compute all of them.
    """

    device: torch.device
    alpha: float | None
    shares_a_launch: bool


def _make_groups(weights: Sequence[LiveWeight], launches: bool) -> dict[_Group, list[LiveWeight]]:
    """Return the weights that are not on the CPU, by group.

    Args:
        weights: The weights of a model.
        launches: True if the originals are on the weights' devices, where a kernel can read them.
    """
    groups: dict[_Group, list[LiveWeight]] = {}
    for weight in weights:
        if not _on_cpu(weight):
            shared = launches and gpu_tensors.on_gpu(weight.out) and "F64" not in weight.dtypes
            groups.setdefault(_Group(weight.out.device, weight.alpha, shared), []).append(weight)
    return groups


def _make_jobs(weight: LiveWeight) -> Iterator[_Job]:
    """Yield the jobs that compute a weight on the CPU."""
    sft, aligned, out = (
        Operand(Address(tensor.data_ptr(), tensor.nbytes), torch_names()[tensor.dtype])
        for tensor in (weight.sft, weight.aligned, weight.out)
    )
    n = aligned.elements
    for start in range(0, n, CPU_ELEMENTS):
        some = min(CPU_ELEMENTS, n - start)
        yield _Job(sft.part(start, some), aligned.part(start, some), out.part(start, some).memory, weight.alpha)


class _Job(NamedTuple):
    """Some elements of one weight on the CPU.

    Attributes:
        sft: The elements of sft.
        aligned: The elements of aligned.
        out: The memory of the weight's elements.
        alpha: The weight's own alpha; None for the alpha of the model.
    """

    sft: Operand
    aligned: Operand
    out: Address
    alpha: float | None

    def __call__(self, value: float) -> None:
        """Compute the elements for a value of the model's alpha."""
        alpha = working_alpha(value if self.alpha is None else self.alpha, self.sft.dtype, self.aligned.dtype)
        if alpha:
            compute_on_cpu(self.sft, self.aligned, alpha, self.out)
        else:
            ctypes.memmove(self.out.start, self.aligned.memory.start, self.out.nbytes)
