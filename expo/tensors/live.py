"""Live: a model in memory whose alpha can be set, in one pass over its weights, as often as one likes.

    weights = aligned + alpha * (aligned - sft)

with the bits that merged files would have: the same plan pairs the tensors, and the same engines compute. The weights
are what the model's files hold: its parameters and its persistent buffers. The two originals are kept beside the model,
as the weights themselves are overwritten.
Bytes moved when an alpha is set: both originals read and the weights written, once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import FROM_TORCH, torch_dtypes
from ..errors import EngineError, PlanError, UsageError
from ..execution import gpu_kernels as gpu
from ..execution.engines import cpu_count
from ..inputs.resolve import StrPath, open_one
from ..kernels.contract import Address, Operand, working_alpha
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..planning.steps import NOT_IN_SFT, ONLY_IN_SFT, Step
from ..text import size_text
from .arrays import THREADS, compute_on_cpu
from .memory_checks import check_memory

KEEP = ("device", "host", "disk")
NAMES = {dtype: name for name, dtype in torch_dtypes().items()}
IN_MEMORY = "a live model has all its weights in the memory of one process, so load the whole model there"
JOB = 1 << 21  # elements that a thread of the CPU takes at a time
PART = 1 << 24  # elements of originals that go to a device at a time
ALIGNMENT = 64  # bytes: what the widest accesses want

Reads = Callable[[str, int, memoryview], None]  # (tensor's name, first byte, memory to fill)


class Trio(NamedTuple):
    """A weight, or rows of one, and both originals; alpha: the one that alpha_for gives it, None for the model's."""

    out: torch.Tensor
    aligned: torch.Tensor
    sft: torch.Tensor
    alpha: float | None

    @property
    def dtypes(self) -> tuple[str, str]:
        return NAMES[self.sft.dtype], NAMES[self.aligned.dtype]


class Live:
    """A model whose weights are aligned + alpha * (aligned - sft) for the alpha that is set.

    live.alpha = 0.4 rewrites the parameters in place, and the floating-point buffers that the model's files hold, such
    as a router's bias; live.alpha = 0 restores aligned, all of it. A tied weight is rewritten once. Buffers that are
    not saved or that the model computes, such as rotary frequencies, stay as they are, and so do integers. As a context
    manager it restores aligned and lets go of the originals.
    For one thread, and while nothing else uses the model. live.memory: bytes that the originals take where they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sft: torch.nn.Module | StrPath,
        *,
        keep: str = "device",
        alpha_for: Mapping[str, float] | None = None,
        on_unpaired: str = "error",
        on_mismatch: str = "error",
    ) -> None:
        """model: holds the aligned weights, of dtype bf16, fp16, fp32 or fp64, all on one device.

        sft: another model of the kind, or what merge() takes as sft: a folder, a file, a hub id.
        keep: where the originals live: on the model's "device", in the "host"'s memory, or on the "disk" in an unnamed
            temporary file (TMPDIR says where). They take the bytes of both models; with "device" a model given as sft
            is used where it is, and must not change meanwhile.
        alpha_for, on_unpaired, on_mismatch: as for merge(); a UserWarning says so where they leave most of the weights
            as they are.
        Raises UsageError, CheckpointError, PlanError, and EngineError where there is too little room for the originals.
        """
        if keep not in KEEP:
            raise UsageError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
        aligned = described(model, "model")
        self._device = next(model.parameters()).device
        with ExitStack() as stack:
            if isinstance(sft, torch.nn.Module):
                other: ModelTensors = described(sft, "sft")
                reads = _from_module(sft)
            else:
                other = checkpoint = stack.enter_context(open_one(sft))
                reads = _from_files(checkpoint)
            options = MergeOptions(alpha_for=alpha_for or {}, on_unpaired=on_unpaired, on_mismatch=on_mismatch)
            matched = match_tensors(other, aligned, options)
            _check(matched, by_files=not isinstance(sft, torch.nn.Module))
            for note in matched.notes:
                warnings.warn(note, stacklevel=2)
            there = saved(sft) if isinstance(sft, torch.nn.Module) and keep == "device" else {}
            self._trios, self.memory = _remember(matched.steps, saved(model), self._device, reads, keep, there)
        changed = {step.name for step in matched.steps if step.sft is not None}
        self._buffers = sorted(changed - dict(model.named_parameters()).keys())
        self._jobs = [job for trio in self._trios for job in _jobs(trio)] if self._device.type == "cpu" else []
        self._model = model
        self._places = self._where()
        self._threads = min(cpu_count(), THREADS)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expo-live")
        self._tables: dict[float | None, Any] = {}
        self._launches = keep == "device" and self._device.type == "cuda"
        self._alpha: float | None = 0.0
        self._closed = False

    @property
    def alpha(self) -> float | None:
        """The alpha that the weights are of; None after a failure in the middle."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        """Raises UsageError for a number that is not finite in fp32, and where the model has been moved or closed."""
        try:
            working_alpha(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"alpha must be a number that is finite in float32, got {value!r}") from error
        if self._closed:
            raise UsageError("this Live is closed: make another")
        if self._where() != self._places:
            raise UsageError("the model's weights are not where they were: move the model before Live is made")
        self._alpha = None
        with torch.no_grad():
            if value == 0:
                for trio in self._trios:
                    trio.out.copy_(trio.aligned)
            elif self._device.type == "cpu":
                self._on_cpu(value)
            else:
                self._on_device(value)
        self._alpha = float(value)

    def _on_cpu(self, value: float) -> None:
        """All jobs, by as many threads as pay: each takes the next when it is free."""
        queue = iter(self._jobs)

        def work(_: int) -> None:
            for job in queue:
                job(value)

        list(self._pool.map(work, range(self._threads)))

    def _where(self) -> list[int]:
        buffers = (self._model.get_buffer(name) for name in self._buffers)
        return [tensor.data_ptr() for tensor in (*self._model.parameters(), *buffers)]

    def _on_device(self, value: float) -> None:
        groups: dict[tuple[float | None, bool], list[Trio]] = {}
        for trio in self._trios:
            together = self._launches and "F64" not in trio.dtypes
            groups.setdefault((trio.alpha, together), []).append(trio)
        for (own, together), trios in groups.items():
            alpha = value if own is None else own
            table = self._table(own, trios) if together and working_alpha(alpha) else None
            if table is not None:
                gpu.compute_table(table, working_alpha(alpha))
                continue
            for trio in trios:
                self._in_parts(trio, working_alpha(alpha, *trio.dtypes))

    def _table(self, own: float | None, trios: Sequence[Trio]) -> Any:
        """Return the table of all tensors that share this alpha, kept for later launches; None where there is none."""
        if own not in self._tables:
            made = gpu.table((trio.sft, trio.aligned, trio.out) for trio in trios)
            if made is None:  # for want of memory, perhaps: the next call asks again
                return None
            self._tables[own] = made
        return self._tables[own]

    def _in_parts(self, trio: Trio, alpha: float) -> None:
        """One tensor, whose originals may have to come to the device first."""
        columns = (torch.split(each.reshape(-1), PART) for each in (trio.sft, trio.aligned, trio.out))
        for sft, aligned, out in zip(*columns, strict=True):
            s, a = (each.to(self._device, non_blocking=True) for each in (sft, aligned))
            if alpha:
                gpu.compute(s, a, alpha, out)
            else:
                out.copy_(a)

    def close(self) -> None:
        """Restore aligned and let go of the originals; a no-op the second time."""
        if not self._closed:
            self.alpha = 0.0
        self._closed = True
        self._pool.shutdown()
        self._trios, self._jobs, self._tables, self.memory = [], [], {}, 0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def saved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a model, which are what its files hold: parameters and persistent buffers, by name.

    A tied weight is there once, under its first name. The names are those of model.state_dict().
    """
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # transformers'
    found: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if name not in computed
    }
    places = {_home(tensor) for tensor in found.values()}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            unsaved = buffer is None or name in module._non_persistent_buffers_set or full in computed
            if buffer is None or unsaved or _home(buffer) in places:
                continue
            places.add(_home(buffer))
            found[full] = buffer
    return found


def _home(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that are one, or views of the same memory."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True)
class ModelInMemory:
    """The tensors of a model in memory, as the matching needs them: see `ModelTensors`."""

    path: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    adapter: None = None
    notes: tuple[str, ...] = ()


def described(model: torch.nn.Module, role: str) -> ModelInMemory:
    """Return the tensors of a model by name. Raises UsageError for parameters that cannot change.

    A buffer of a dtype that files of weights do not hold is left out.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in saved(model).items():
        dtype = FROM_TORCH.get(str(tensor.dtype).removeprefix("torch."))
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if dtype is None and not is_parameter:
            continue
        check_memory(torch, tensor, f"{role}: {name}", IN_MEMORY)
        if is_parameter:
            _check_tensor(tensor, name, role)
        tensors[name] = TensorInfo(name, str(dtype), tuple(tensor.shape), 0, tensor.nbytes)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UsageError(
            f"{role}: parameters must be on one device, got {', '.join(sorted(map(str, devices))) or 'none'}"
        )
    config: Any = getattr(model, "config", None)
    return ModelInMemory(role, tensors, config.to_dict() if hasattr(config, "to_dict") else {})


def _check_tensor(tensor: torch.Tensor, name: str, role: str) -> None:
    """Raise UsageError where the kernels cannot read and write the tensor in place."""
    what = "parameters" if isinstance(tensor, torch.nn.Parameter) else "buffers that files hold"
    if tensor.dtype not in NAMES or not tensor.is_contiguous() or tensor.layout != torch.strided or tensor.is_neg():
        raise UsageError(f"{role}: {name} is {tensor.dtype}: {what} must be contiguous bf16, fp16, fp32 or fp64")


def _check(matched: Matched, by_files: bool) -> None:
    """Raise PlanError with every problem, and what helps where names in memory are not those of the files."""
    alone = any(reason == ONLY_IN_SFT for reason in matched.dropped.values())
    if matched.problems and by_files and alone and any(step.reason == NOT_IN_SFT for step in matched.steps):
        raise PlanError(
            "names in memory are not those of the files; where the library that loads them changes names, as "
            "transformers fuses experts, give sft as a model that it has loaded too\n" + "\n".join(matched.problems)
        )
    matched.check()


def _from_module(model: torch.nn.Module) -> Reads:
    weights = saved(model)

    def read(name: str, start: int, into: memoryview) -> None:
        flat = weights[name].detach().reshape(-1).view(torch.uint8)[start : start + len(into)]
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat)

    return read


def _from_files(checkpoint: Checkpoint) -> Reads:
    def read(name: str, start: int, into: memoryview) -> None:
        checkpoint.reader(name).read(start, into)

    return read


def _remember(
    steps: Sequence[Step],
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    reads: Reads,
    keep: str,
    there: Mapping[str, torch.Tensor],
) -> tuple[list[Trio], int]:
    """Every weight that will change, and its originals; and the bytes that these take.

    there: sft's tensors that are used where they are. Raises UsageError.
    """
    steps = [step for step in steps if step.sft is not None]
    for name in {step.name for step in steps}:
        _check_tensor(weights[name], name, "model")
        if weights[name].device != device:
            raise UsageError(f"model: {name} is on {weights[name].device}, and the parameters are on {device}")
    at_hand = {name for name, tensor in there.items() if tensor.device == device and tensor.is_contiguous()}
    wanted = [step.aligned for step in steps]
    wanted += [step.sft for step in steps if step.sft and step.sft.name not in at_hand]
    room = Room(sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in wanted), keep, device)
    trios = []
    for step in steps:
        assert step.sft is not None
        out = _rows(weights[step.name].detach(), step)
        aligned = room.take(step.aligned)
        aligned.copy_(out)
        if step.sft.name in at_hand:
            sft = _rows(there[step.sft.name].detach(), step)
        else:
            sft = room.take(step.sft)
            _fill(sft, step.sft, reads)
        trios.append(Trio(out, aligned, sft, step.own_alpha))
    return trios, sum(tensor.nbytes for tensor in wanted)


def _rows(tensor: torch.Tensor, step: Step) -> torch.Tensor:
    return tensor if tuple(tensor.shape) == step.shape else tensor[: step.shape[0]]


def _fill(tensor: torch.Tensor, source: TensorInfo, reads: Reads) -> None:
    """Read an original into its place, a part at a time where that is a device's memory."""
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, source.nbytes, PART):
        part = flat[start : start + PART]
        host = part if part.device.type == "cpu" else torch.empty(len(part), dtype=torch.uint8)
        reads(source.name, source.start + start, host.numpy().data)
        if host is not part:
            part.copy_(host)


class Room:
    """Memory for originals on a device, in the host or on the disk, taken bit by bit."""

    def __init__(self, needed: int, keep: str, device: torch.device) -> None:
        """needed: bytes. Raises EngineError where there is less."""
        self._at = 0
        where, free = _free(keep, device)
        if free is not None and needed > free:
            others = ", ".join(each for each in KEEP if each != keep)
            raise EngineError(
                f"keep={keep!r} takes {size_text(needed)} of {where}, but {size_text(free)} are free: try {others}"
            )
        if keep == "disk":
            self._memory = torch.frombuffer(_mapped(max(needed, 1)), dtype=torch.uint8)
        elif keep == "host" and device.type == "cuda":
            self._memory = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        else:
            self._memory = torch.empty(needed, dtype=torch.uint8, device="cpu" if keep == "host" else device)

    def take(self, tensor: TensorInfo) -> torch.Tensor:
        """Memory of a tensor's dtype and shape."""
        start, self._at = self._at, self._at + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return self._memory[start : start + tensor.nbytes].view(torch_dtypes()[tensor.dtype]).view(tensor.shape)


def _mapped(size: int) -> mmap.mmap:
    """An unnamed file of this size, on the disk for temporary files."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _free(keep: str, device: torch.device) -> tuple[str, int | None]:
    """What is meant by a keep, and the bytes that are free there; None where nobody knows."""
    if keep == "disk":
        folder = tempfile.gettempdir()
        return f"the disk of {folder}", shutil.disk_usage(folder).free
    if keep == "device" and device.type == "cuda":
        return str(device), torch.cuda.mem_get_info(device)[0]
    if keep == "device" and device.type != "cpu":
        return str(device), None
    return "memory", available_memory()


def available_memory() -> int | None:
    """Bytes that programs may still take without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def _jobs(trio: Trio) -> Iterator[_Job]:
    """Yield the jobs that compute a tensor on the CPU."""
    sft, aligned, out = (
        Operand(Address(tensor.data_ptr(), tensor.nbytes), NAMES[tensor.dtype])
        for tensor in (trio.sft, trio.aligned, trio.out)
    )
    n = aligned.elements
    for start in range(0, n, JOB):
        some = min(JOB, n - start)
        yield _Job(sft.part(start, some), aligned.part(start, some), out.part(start, some).memory, trio.alpha)


class _Job(NamedTuple):
    """Some elements of one tensor on the CPU: those of sft and aligned, the memory of the weights, and their alpha."""

    sft: Operand
    aligned: Operand
    out: Address
    alpha: float | None

    def __call__(self, value: float) -> None:
        alpha = working_alpha(value if self.alpha is None else self.alpha, self.sft.dtype, self.aligned.dtype)
        if alpha:
            compute_on_cpu(self.sft, self.aligned, alpha, self.out)
        else:
            ctypes.memmove(self.out.start, self.aligned.memory.start, self.out.nbytes)
