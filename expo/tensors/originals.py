"""The originals of a live model, aligned's and sft's weights, on a device, in the host's memory or on the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import ITEMSIZE, torch_dtypes, torch_names
from ..errors import EngineError, UsageError
from ..execution.gpu_fallback import error_text, is_out_of_memory
from ..kernels.pinned import pinned
from ..planning.steps import Step, some_rows
from ..text import size_text
from .distributed_tensors import block_of, check_alike, is_distributed, local_part
from .model_weights import check_weight

KEEP = ("device", "host", "disk")
ALIGNMENT = 64  # bytes: the widest accesses need addresses that are multiples of it
COPY_BYTES = 1 << 24  # bytes of an original that are read at a time on their way to a device
SAME_CALLS = "apply the same fully_shard() or parallelize_module() to both models"

ReadTensor = Callable[[str, int, memoryview], None]  # (name of a tensor, its first byte, memory to fill)


class LiveWeight(NamedTuple):
    """A weight of the model, or some rows of it, with both originals.

    Attributes:
        out: The weight itself.
        aligned: A copy of aligned's numbers.
        sft: The numbers of sft.
        alpha: The alpha that `alpha_for` gives the weight; None if the weight follows the alpha of the model.
    """

    out: torch.Tensor
    aligned: torch.Tensor
    sft: torch.Tensor
    alpha: float | None

    @property
    def dtypes(self) -> tuple[str, str]:
        """The dtypes of sft and aligned."""
        return torch_names()[self.sft.dtype], torch_names()[self.aligned.dtype]


def read_from_tensors(tensors: Mapping[str, torch.Tensor]) -> ReadTensor:
    """Return a function that reads bytes of the contiguous tensors of a model."""

    def read(name: str, start: int, into: memoryview) -> None:
        flat = tensors[name].reshape(-1).view(torch.uint8)[start : start + len(into)]
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat)

    return read


def read_from_checkpoint(checkpoint: Checkpoint) -> ReadTensor:
    """Return a function that reads bytes of a checkpoint's tensors."""

    def read(name: str, start: int, into: memoryview) -> None:
        checkpoint.reader(name).read(start, into)

    return read


class Part(NamedTuple):
    """This process's part of a checkpoint's tensor.

    Attributes:
        whole: The tensor.
        offsets: The begin of the part along each dimension.
        shape: The shape of the part.
    """

    whole: TensorInfo
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def read_parts(read: ReadTensor, parts: Mapping[str, Part]) -> ReadTensor:
    """Return a function that reads bytes of this process's parts of a checkpoint's tensors.

    Args:
        read: Reads bytes of whole tensors.
        parts: The parts by name.
    """

    @lru_cache(maxsize=1)
    def part(name: str) -> torch.Tensor:
        whole, offsets, shape = parts[name]
        rows = whole if shape == whole.shape else some_rows(whole, offsets[0], offsets[0] + shape[0])
        memory = torch.empty(rows.nbytes, dtype=torch.uint8)
        read(whole.name, rows.start, memory.numpy().data)
        tensor = memory.view(torch_dtypes()[whole.dtype]).view(rows.shape)
        for dimension in range(1, len(shape)):
            tensor = tensor.narrow(dimension, offsets[dimension], shape[dimension])
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    def read_part(name: str, start: int, into: memoryview) -> None:
        if name in parts:
            torch.frombuffer(into, dtype=torch.uint8).copy_(part(name)[start : start + len(into)])
        else:
            read(name, start, into)

    return read_part


def local_steps(
    steps: Sequence[Step], weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor] | None
) -> tuple[list[Step], dict[str, Part]]:
    """Return the steps with the shapes of this process's parts of DTensors, and the parts to read for `read_parts`.

    Args:
        steps: The steps of the tensors that are extrapolated, with the shapes of whole tensors.
        weights: The weights of aligned by name.
        others: The weights of sft by name; None if sft is given as files.

    Raises:
        UsageError: A weight and its counterpart are not distributed alike, or no part can be read from a file.
    """
    local: list[Step] = []
    parts: dict[str, Part] = {}
    for step in steps:
        assert step.sft is not None
        weight, other = weights[step.name], None if others is None else others[step.sft.name]
        if is_distributed(weight) or is_distributed(other):
            shapes = tuple(weight.shape), step.sft.shape if other is None else tuple(other.shape)
            if step.whole is not None:
                raise UsageError(
                    f"model: {step.name} is a DTensor, and sft has other tensors in its place, "
                    f"such as {step.sft.name}: merge the files and load the result"
                )
            if step.rows is not None or shapes[0] != shapes[1]:
                raise UsageError(
                    f"model: {step.name} is a DTensor of shape {shapes[0]}, and sft has the shape {shapes[1]}: "
                    "on_mismatch='rows' needs whole tensors, so merge the files and load the result"
                )
            name = f"this process's part of {step.name}"
            sides: list[tuple[str, Any]] = [(f"model: {step.name}", weight)]
            if others is not None:
                sides.append((f"sft: {step.sft.name}", other))
            check_alike(sides, SAME_CALLS)
            if others is None:
                parts[name] = Part(step.sft, *block_of(*sides[0]))
                counterpart = _part_info(name, step.sft.dtype, weight)
            else:
                counterpart = _part_info(step.sft.name, step.sft.dtype, other)
            step = step._replace(aligned=_part_info(step.name, step.aligned.dtype, weight), sft=counterpart)
        local.append(step)
    return local, parts


def _part_info(name: str, dtype: str, tensor: Any) -> TensorInfo:
    """Return the description of a tensor of a dtype that has the shape of this process's part of `tensor`."""
    shape = tuple(local_part(tensor).shape)
    return TensorInfo(name, dtype, shape, 0, element_count(shape) * ITEMSIZE[dtype])


def keep_originals(
    steps: Sequence[Step],
    weights: Mapping[str, torch.Tensor],
    read: ReadTensor,
    keep: str,
    usable: Mapping[str, torch.Tensor],
) -> tuple[list[LiveWeight], int]:
    """Return every weight that alpha changes, with its originals, and the bytes that the originals take.

    Args:
        steps: The steps of the tensors that are extrapolated.
        weights: The model's weights by name.
        read: Reads bytes of sft's tensors.
        keep: The place of the originals; "device" is the device of each weight.
        usable: The tensors of sft that are used where they are, if they are contiguous and on the weight's device.

    Raises:
        UsageError: A weight cannot be rewritten in place.
        EngineError: The place has too little memory.
    """
    for name in {step.name for step in steps}:
        check_weight(weights[name], name, "model")
    copied: list[tuple[TensorInfo, torch.device]] = []
    in_place = []
    for step in steps:
        assert step.sft is not None
        device, other = weights[step.name].device, usable.get(step.sft.name)
        in_place.append(other is not None and other.device == device and other.is_contiguous())
        copied += [(tensor, device) for tensor in (step.aligned, step.sft)[: 1 if in_place[-1] else 2]]
    memory = OriginalsMemory(copied, keep)
    live_weights = []
    for step, is_used_in_place in zip(steps, in_place, strict=True):
        assert step.sft is not None
        out = _part(weights[step.name].detach(), step.aligned)
        aligned = memory.take(step.aligned, out.device)
        aligned.copy_(out)
        if is_used_in_place:
            sft = _part(usable[step.sft.name].detach(), step.sft)
        else:
            sft = memory.take(step.sft, out.device)
            _fill(sft, step.sft, read)
        live_weights.append(LiveWeight(out, aligned, sft, step.own_alpha))
    return live_weights, sum(tensor.nbytes for tensor, _ in copied)


def _part(tensor: torch.Tensor, part: TensorInfo) -> torch.Tensor:
    """Return the elements of a contiguous tensor that a step covers, with bytes counted from the tensor's begin."""
    if tuple(tensor.shape) == part.shape:
        return tensor
    first = part.start // ITEMSIZE[part.dtype]
    return tensor.view(-1)[first : first + element_count(part.shape)].view(part.shape)


def _fill(tensor: torch.Tensor, source: TensorInfo, read: ReadTensor) -> None:
    """Read an original into its memory, in parts if that is a device's memory."""
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, source.nbytes, COPY_BYTES):
        part = flat[start : start + COPY_BYTES]
        host = part if part.device.type == "cpu" else torch.empty(len(part), dtype=torch.uint8)
        read(source.name, source.start + start, host.numpy().data)
        if host is not part:
            part.copy_(host)


class OriginalsMemory:
    """Memory for originals on devices, in the host's memory or on the disk, which tensors take one after the other."""

    def __init__(self, tensors: Sequence[tuple[TensorInfo, torch.device]], keep: str) -> None:
        """Allocate memory for tensors, each with the device of its weight. Raises EngineError if too little is free."""
        self._keep = keep
        self._used: dict[torch.device | None, int] = {}
        needed: dict[torch.device | None, int] = {}
        for tensor, device in tensors:
            place = self._place(device)
            needed[place] = needed.get(place, 0) + _aligned(tensor.nbytes)
        gpus = {device for _, device in tensors if device.type == "cuda"}
        self._memory = {place: _checked_memory(size, keep, place, gpus) for place, size in needed.items()}

    def _place(self, device: torch.device) -> torch.device | None:
        """Return the device of an original whose weight is on `device`; None for the host's memory and the disk."""
        return device if self._keep == "device" else None

    def take(self, tensor: TensorInfo, device: torch.device) -> torch.Tensor:
        """Return memory with a tensor's dtype and shape, for a weight on `device`."""
        place = self._place(device)
        start = self._used.get(place, 0)
        self._used[place] = start + _aligned(tensor.nbytes)
        memory = self._memory[place][start : start + tensor.nbytes]
        return memory.view(torch_dtypes()[tensor.dtype]).view(tensor.shape)


def _aligned(nbytes: int) -> int:
    """Return the bytes from the begin of an original to the begin of the next one."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _checked_memory(size: int, keep: str, device: torch.device | None, gpus: Collection[torch.device]) -> torch.Tensor:
    """Return memory as `_allocate` does. Raises EngineError, with the other places, if too little is free."""
    where, free = _free_bytes(keep, device)
    others = ", ".join(place for place in KEEP if place != keep)
    takes = f"`keep={keep!r}` takes {size_text(size)} of {where}"
    if free is not None and size > free:
        raise EngineError(f"{takes}, but {size_text(free)} are free: try {others}")
    try:
        return _allocate(size, keep, device, gpus)
    except (RuntimeError, MemoryError, OSError) as error:
        # The free bytes may be unknown, in pieces that are too small, or taken by another process meanwhile.
        if isinstance(error, RuntimeError) and not _ran_out(error):
            raise
        raise EngineError(f"{takes}, but could not get it ({error_text(error)}): try {others}") from error


def _allocate(size: int, keep: str, device: torch.device | None, gpus: Collection[torch.device]) -> torch.Tensor:
    """Return memory on the device or, without a device, on the disk or in the host's memory, pinned for the GPUs."""
    if keep == "disk":
        return torch.frombuffer(_mapped(max(size, 1)), dtype=torch.uint8)
    if device is None:
        return pinned(size, gpus) if gpus else torch.empty(size, dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _ran_out(error: RuntimeError) -> bool:
    """Return True if an error of torch says that a device's memory or the host's memory ran out."""
    return is_out_of_memory(error) or "can't allocate memory" in str(error)


def _mapped(size: int) -> mmap.mmap:
    """Return a mapping of an unnamed file of this size, on the disk for temporary files."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _free_bytes(keep: str, device: torch.device | None) -> tuple[str, int | None]:
    """Return the name of the place that `keep` and the device mean, and its free bytes; None if they are unknown."""
    if keep == "disk":
        folder = tempfile.gettempdir()
        return f"the disk of {folder}", shutil.disk_usage(folder).free
    if device is not None and device.type == "cuda":
        # Torch caches freed memory. It uses this memory again, or returns it to the device when it needs more.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return str(device), torch.cuda.mem_get_info(device)[0] + cached
    if device is not None and device.type != "cpu":
        return str(device), None
    return "memory", available_memory()


def available_memory() -> int | None:
    """Return the bytes that programs may still take without swapping; None if they are unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None
