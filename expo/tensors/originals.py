"""The originals of a live model, aligned's and sft's weights, on a device, in the host's memory or on the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import torch_dtypes, torch_names
from ..errors import EngineError, UsageError
from ..execution.gpu_fallback import error_text, is_out_of_memory
from ..planning.steps import Step
from ..text import size_text
from .model_weights import check_weight, saved_weights

KEEP = ("device", "host", "disk")
ALIGNMENT = 64  # bytes: the widest accesses need addresses that are multiples of it
COPY_BYTES = 1 << 24  # bytes of an original that are read at a time on their way to a device

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


def read_from_model(model: torch.nn.Module) -> ReadTensor:
    """Return a function that reads bytes of a model's weights."""
    weights = saved_weights(model)

    def read(name: str, start: int, into: memoryview) -> None:
        flat = weights[name].detach().reshape(-1).view(torch.uint8)[start : start + len(into)]
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat)

    return read


def read_from_checkpoint(checkpoint: Checkpoint) -> ReadTensor:
    """Return a function that reads bytes of a checkpoint's tensors."""

    def read(name: str, start: int, into: memoryview) -> None:
        checkpoint.reader(name).read(start, into)

    return read


def keep_originals(
    steps: Sequence[Step],
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    read: ReadTensor,
    keep: str,
    usable: Mapping[str, torch.Tensor],
) -> tuple[list[LiveWeight], int]:
    """Return every weight that alpha changes, with its originals, and the bytes that the originals take.

    Args:
        steps: The steps of the tensors that are extrapolated.
        weights: The model's weights by name.
        device: The device of the model.
        read: Reads bytes of sft's tensors.
        keep: The place of the originals.
        usable: The tensors of sft that are used where they are, if they are contiguous and on the device.

    Raises:
        UsageError: A weight cannot be rewritten in place.
        EngineError: The place has too little memory.
    """
    for name in {step.name for step in steps}:
        check_weight(weights[name], name, "model")
        if weights[name].device != device:
            raise UsageError(f"model: {name} is on {weights[name].device}, and the parameters are on {device}")
    in_place = {name for name, tensor in usable.items() if tensor.device == device and tensor.is_contiguous()}
    copied = [step.aligned for step in steps]
    copied += [step.sft for step in steps if step.sft and step.sft.name not in in_place]
    memory = OriginalsMemory(sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in copied), keep, device)
    live_weights = []
    for step in steps:
        assert step.sft is not None
        out = _rows(weights[step.name].detach(), step)
        aligned = memory.take(step.aligned)
        aligned.copy_(out)
        if step.sft.name in in_place:
            sft = _rows(usable[step.sft.name].detach(), step)
        else:
            sft = memory.take(step.sft)
            _fill(sft, step.sft, read)
        live_weights.append(LiveWeight(out, aligned, sft, step.own_alpha))
    return live_weights, sum(tensor.nbytes for tensor in copied)


def _rows(tensor: torch.Tensor, step: Step) -> torch.Tensor:
    """Return the rows of a tensor that a step covers."""
    return tensor if tuple(tensor.shape) == step.shape else tensor[: step.shape[0]]


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
    """Memory for originals on a device, in the host's memory or on the disk, which tensors take one after the other."""

    def __init__(self, needed: int, keep: str, device: torch.device) -> None:
        """Allocate `needed` bytes. Raises EngineError if fewer are free."""
        self._used = 0
        where, free = _free_bytes(keep, device)
        others = ", ".join(place for place in KEEP if place != keep)
        takes = f"`keep={keep!r}` takes {size_text(needed)} of {where}"
        if free is not None and needed > free:
            raise EngineError(f"{takes}, but {size_text(free)} are free: try {others}")
        try:
            self._memory = _allocated(needed, keep, device)
        except (RuntimeError, MemoryError, OSError) as error:
            # The free bytes may be unknown, in pieces that are too small, or taken by another process meanwhile.
            if isinstance(error, RuntimeError) and not _ran_out(error):
                raise
            raise EngineError(f"{takes}, but could not get it ({error_text(error)}): try {others}") from error

    def take(self, tensor: TensorInfo) -> torch.Tensor:
        """Return memory with a tensor's dtype and shape."""
        start, self._used = self._used, self._used + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return self._memory[start : start + tensor.nbytes].view(torch_dtypes()[tensor.dtype]).view(tensor.shape)


def _allocated(needed: int, keep: str, device: torch.device) -> torch.Tensor:
    """Return new memory of `needed` bytes. Raises an error of torch, CUDA or the system if there is too little."""
    if keep == "disk":
        return torch.frombuffer(_mapped(max(needed, 1)), dtype=torch.uint8)
    if keep == "host" and device.type == "cuda":
        return torch.empty(needed, dtype=torch.uint8, pin_memory=True)
    return torch.empty(needed, dtype=torch.uint8, device="cpu" if keep == "host" else device)


def _ran_out(error: RuntimeError) -> bool:
    """Return True if an error of torch says that a device's memory or the host's memory ran out."""
    return is_out_of_memory(error) or "can't allocate memory" in str(error)


def _mapped(size: int) -> mmap.mmap:
    """Return a mapping of an unnamed file of this size, on the disk for temporary files."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _free_bytes(keep: str, device: torch.device) -> tuple[str, int | None]:
    """Return the name of the place that `keep` means, and its free bytes; None if they are unknown."""
    if keep == "disk":
        folder = tempfile.gettempdir()
        return f"the disk of {folder}", shutil.disk_usage(folder).free
    if keep == "device" and device.type == "cuda":
        # Torch caches freed memory. It uses this memory again, or returns it to the device when it needs more.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return str(device), torch.cuda.mem_get_info(device)[0] + cached
    if keep == "device" and device.type != "cpu":
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
