"""Live: a model in memory whose alpha can be set, in one pass over its parameters, as often as one likes.

    parameters = aligned + alpha * (aligned - sft)

with the bits that merged files would have: the same plan pairs the tensors, and the same engines compute. The two
originals are kept beside the model, as the parameters themselves are overwritten.
Bytes moved when an alpha is set: both originals read and the parameters written, once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch

from . import gpu
from .arrays import THREADS, compute_at
from .checkpoint import Checkpoint
from .engines import cpu_count
from .errors import EngineError, UsageError
from .header import Header, TensorInfo, element_count
from .inputs import StrPath, open_one
from .kernels.contract import ITEMSIZE, working_alpha
from .kernels.twin import DTYPES
from .plan import Plan, make_plan
from .progress import size
from .steps import Step

KEEP = ("device", "host", "disk")
NAMES = {dtype: name for name, dtype in DTYPES.items()}
JOB = 1 << 21  # elements that a thread of the CPU takes at a time
PART = 1 << 24  # elements of originals that go to a device at a time
ALIGNMENT = 64  # bytes: what the widest accesses want

Reads = Callable[[str, int, memoryview], None]  # (tensor's name, first byte, memory to fill)


class Trio(NamedTuple):
    """A parameter, or rows of one, and both originals; alpha: the one that alpha_for gives it, None for the model's."""

    out: torch.Tensor
    aligned: torch.Tensor
    sft: torch.Tensor
    alpha: float | None

    @property
    def dtypes(self) -> tuple[str, str]:
        return NAMES[self.sft.dtype], NAMES[self.aligned.dtype]


class Live:
    """A model whose parameters are aligned + alpha * (aligned - sft) for the alpha that is set.

    live.alpha = 0.4 rewrites the parameters in place, live.alpha = 0 restores aligned, all of it; a tied parameter is
    rewritten once, buffers are not touched. As a context manager it restores aligned and lets go of the originals.
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
        alpha_for, on_unpaired, on_mismatch: as for merge().
        Raises UsageError, CheckpointError, PlanError, and EngineError where there is too little room for the originals.
        """
        if keep not in KEEP:
            raise UsageError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
        aligned = _described(model, "model")
        self._device = next(model.parameters()).device
        with ExitStack() as stack:
            if isinstance(sft, torch.nn.Module):
                weak, reads = _described(sft, "sft"), _from_module(sft)
            else:
                weak = stack.enter_context(open_one(sft))
                reads = _from_files(weak)
            # Two alphas tell apart the tensors that follow the model's from those with one of their own.
            plan = make_plan(weak, aligned, [1.0, 2.0], alpha_for, on_unpaired, on_mismatch)
            plan.check()
            there = dict(sft.named_parameters()) if isinstance(sft, torch.nn.Module) and keep == "device" else {}
            self._trios, self.memory = _remember(plan, dict(model.named_parameters()), reads, keep, there)
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
        """The alpha that the parameters are of; None after a failure in the middle."""
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
            raise UsageError("the model's parameters are not where they were: move the model before Live is made")
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
        return [parameter.data_ptr() for parameter in self._model.parameters()]

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
        """Return the table of all tensors that share this alpha, kept for later launches; None for want of kernels."""
        if own not in self._tables:
            self._tables[own] = gpu.table((trio.sft, trio.aligned, trio.out) for trio in trios)
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


def _described(model: torch.nn.Module, role: str) -> Checkpoint:
    """A model's parameters as a checkpoint's tensors, each once. Raises UsageError."""
    tensors: dict[str, TensorInfo] = {}
    devices = set()
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or parameter.layout != torch.strided or parameter.is_meta:
            raise UsageError(
                f"{role}: {name} is a {type(parameter.data).__name__} on {parameter.device}, not in memory"
            )
        if parameter.dtype not in NAMES or not parameter.is_contiguous():
            raise UsageError(
                f"{role}: {name} is {parameter.dtype}: parameters must be contiguous bf16, fp16, fp32 or fp64"
            )
        tensors[name] = TensorInfo(name, NAMES[parameter.dtype], tuple(parameter.shape), 0, parameter.nbytes)
        devices.add(parameter.device)
    if len(devices) != 1:
        raise UsageError(
            f"{role}: parameters must be on one device, got {', '.join(sorted(map(str, devices))) or 'none'}"
        )
    config: Any = getattr(model, "config", None)
    file: Any = SimpleNamespace(header=Header(tuple(tensors.values()), {}))
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    return Checkpoint(role, role, {role: file}, tensors, dict.fromkeys(tensors, role), said)


def _from_module(model: torch.nn.Module) -> Reads:
    parameters = dict(model.named_parameters())

    def read(name: str, start: int, into: memoryview) -> None:
        flat = parameters[name].detach().reshape(-1).view(torch.uint8)[start : start + len(into)]
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat)

    return read


def _from_files(checkpoint: Checkpoint) -> Reads:
    def read(name: str, start: int, into: memoryview) -> None:
        checkpoint.reader(name).read(start, into)

    return read


def _remember(
    plan: Plan, parameters: Mapping[str, torch.nn.Parameter], reads: Reads, keep: str, there: Mapping[str, torch.Tensor]
) -> tuple[list[Trio], int]:
    """Every parameter that will change, and its originals; and the bytes that these take.

    there: sft's tensors that are used where they are.
    """
    device = next(iter(parameters.values())).device
    steps = [step for step in plan.steps if step.sft is not None]
    at_hand = {name for name, tensor in there.items() if tensor.device == device}
    wanted = [step.aligned for step in steps]
    wanted += [step.sft for step in steps if step.sft and step.sft.name not in at_hand]
    room = Room(sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in wanted), keep, device)
    trios = []
    for step in steps:
        assert step.sft is not None
        out = _rows(parameters[step.name].detach(), step)
        aligned = room.take(step.aligned)
        aligned.copy_(out)
        if step.sft.name in at_hand:
            sft = _rows(there[step.sft.name].detach(), step)
        else:
            sft = room.take(step.sft)
            _fill(sft, step.sft, reads)
        alpha = None if step.alphas == (1.0, 2.0) else step.alphas[0]
        trios.append(Trio(out, aligned, sft, alpha))
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
            raise EngineError(f"keep={keep!r} takes {size(needed)} of {where}, but {size(free)} are free: try {others}")
        if keep == "disk":
            self._memory = torch.frombuffer(_mapped(max(needed, 1)), dtype=torch.uint8)
        elif keep == "host" and device.type == "cuda":
            self._memory = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        else:
            self._memory = torch.empty(needed, dtype=torch.uint8, device="cpu" if keep == "host" else device)

    def take(self, tensor: TensorInfo) -> torch.Tensor:
        """Memory of a tensor's dtype and shape."""
        start, self._at = self._at, self._at + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return self._memory[start : start + tensor.nbytes].view(DTYPES[tensor.dtype]).view(tensor.shape)


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
    """The parts of a tensor on the CPU."""
    n = element_count(tuple(trio.out.shape))
    items = [ITEMSIZE[name] for name in (*trio.dtypes, trio.dtypes[1])]
    pointers = [each.data_ptr() for each in (trio.sft, trio.aligned, trio.out)]
    for start in range(0, n, JOB):
        places = [place + start * item for place, item in zip(pointers, items, strict=True)]
        yield _Job(places, trio.dtypes, min(JOB, n - start), trio.alpha)


class _Job(NamedTuple):
    """Addresses of sft, aligned and out, and the elements there."""

    places: Sequence[int]
    dtypes: tuple[str, str]
    n: int
    alpha: float | None

    def __call__(self, value: float) -> None:
        alpha = working_alpha(value if self.alpha is None else self.alpha, *self.dtypes)
        if alpha:
            compute_at(self.places, self.dtypes, self.n, alpha)
        else:
            ctypes.memmove(self.places[2], self.places[1], self.n * ITEMSIZE[self.dtypes[1]])
