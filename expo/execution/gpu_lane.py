"""A GPU as a worker of the queue: shards -> pinned memory -> GPU -> pinned memory -> the sink, three streams.

A ring of slots, each with its own buffers on both sides. While one chunk is written by the host, the next is coming
down, another is computed or going up. A slot is filled again only after the host has waited for its last download, so
three waits are all that order a chunk: its kernels wait for its uploads, its downloads for its kernels, and the host
for its downloads. Bytes over the bus: every input up once, every output down once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..dtypes import BITS, ITEMSIZE, torch_dtypes
from ..kernels import sweep
from ..kernels.contract import Operand, extrapolation
from ..kernels.sweep import Partials
from ..planning.plan import Plan
from ..planning.shards import Chunk, Measured, Piece
from ..planning.steps import Step
from .engines import choose
from .gpu_kernels import error_text
from .lanes import RING_SLOTS, ComputedChunk, write_header
from .tensor_source import TensorSource

# Rings whose GPU failed for good are kept: where torch frees their memory and events after that, it aborts the process.
_undrained: list[GpuLane] = []
SMALL = 64 << 10  # bytes of a piece below which the CPU does it: it takes longer to launch a kernel


class Device(Protocol):
    """What the ring asks of a GPU; `kernels.device.Cuda` is one."""

    def pinned(self, size: int) -> torch.Tensor: ...
    def memory(self, size: int) -> torch.Tensor: ...
    def stream(self) -> Any: ...
    def enqueue(self, stream: Any, work: Callable[[], None]) -> None: ...
    def record(self, stream: Any) -> Any: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize(self, event: Any) -> None: ...
    def drain(self, stream: Any) -> None: ...


class Part(NamedTuple):
    """A piece of the chunk that the GPU computes: views of one slot's buffers, each on the host and on the GPU."""

    number: int
    step: Step
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    operands: tuple[Operand, Operand]  # sft and aligned on the GPU, in their dtypes
    results: torch.Tensor  # on the GPU: (active outputs, elements)
    outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    partials: Partials | None
    measured: Partials | None  # the same on the host


class Side(NamedTuple):
    """A slot's buffers on one side of the bus, uint8."""

    sft: torch.Tensor
    aligned: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def partials(self, first: int, rows: int, alphas: int, outputs: int) -> Partials:
        """Statistics from row `first` on, where a row has room for the counts of all outputs."""
        counts = self.counts.view(torch.int32)[first * outputs : first * outputs + rows * alphas]
        return Partials(self.sums.view(torch.float32).view(-1, 3)[first : first + rows], counts.view(-1, alphas))


class Slot:
    """Buffers for one chunk, and what is under way in them."""

    def __init__(self, device: Device, size: int, sft_size: int, outputs: int) -> None:
        rows = 2 * size // sweep.BLOCK + 8 * (size // SMALL + 1)  # an element has 2 bytes at least
        sizes = (sft_size, size, rows * 12, rows * 4 * outputs)
        self.host = Side(*map(device.pinned, sizes))
        self.gpu = Side(*map(device.memory, sizes))
        self.outs = [device.pinned(size) for _ in range(outputs)]
        self.results = device.memory(outputs * size).view(outputs, size)
        self.buffers = [out.numpy().data for out in self.outs]
        self.parts: list[Part] = []
        self.measured: Measured = {}  # what the CPU did
        self.rows = 0
        self.done: Any = None

    def part(self, number: int, piece: Piece, ratio: int, sft_bytes: int, measure: bool) -> Part:
        """Views of what a piece needs; sft's bytes lie `ratio` times as far from the start as aligned's."""
        step, start, stop, at = piece
        assert step.sft is not None
        s, a = slice(at * ratio, at * ratio + sft_bytes), slice(at, at + stop - start)
        kind = torch_dtypes()[step.aligned.dtype]
        results = self.results[: len(step.active), a]
        rows = sweep.partial_rows((stop - start) // ITEMSIZE[step.aligned.dtype])
        first, self.rows = self.rows, self.rows + -(-rows // 4) * 4  # so that every piece's rows start at 16 bytes
        return Part(
            number,
            step,
            inputs=[(self.host.sft[s], self.gpu.sft[s]), (self.host.aligned[a], self.gpu.aligned[a])],
            operands=(
                Operand(self.gpu.sft[s].view(torch_dtypes()[step.sft.dtype]), step.sft.dtype),
                Operand(self.gpu.aligned[a].view(kind), step.aligned.dtype),
            ),
            results=results.view(kind),
            outputs=[(self.outs[k][a], row) for k, row in zip(step.active, results, strict=True)],
            partials=self.gpu.partials(first, rows, len(results), len(self.outs)) if measure else None,
            measured=self.host.partials(first, rows, len(results), len(self.outs)) if measure else None,
        )


class GpuLane:
    """A lane of RING_SLOTS chunks (see `lanes.Lane`) through one GPU; for one thread."""

    depth = RING_SLOTS

    def __init__(self, device: Device, plan: Plan, source: TensorSource, size: int, measure: bool) -> None:
        """size: bytes of a chunk, at most. Raises RuntimeError where the GPU or the host has too little memory left."""
        self._device = device
        self._cpu = choose("auto", "cpu")  # for what the GPU does not do: F64, and small pieces
        self._source = source
        self._measure = measure
        self._ratio = max([1, *(_ratio(step) for step in plan.steps if _on_gpu(step))])
        self._free = deque(Slot(device, size, size * self._ratio, len(plan.alphas)) for _ in range(RING_SLOTS))
        self._up, self._compute, self._down = (device.stream() for _ in range(3))
        self._alphas: dict[tuple[float, ...], torch.Tensor] = {}
        self._busy: deque[Slot] = deque()

    def begin(self, chunk: Chunk) -> None:
        """Read a chunk's inputs and start computing it; at most RING_SLOTS chunks may be under way."""
        slot = self._free.popleft()
        self._busy.append(slot)
        slot.parts, slot.measured, slot.rows = [], {}, 0
        write_header(chunk, slot.buffers)
        for number, piece in enumerate(chunk.pieces):
            self._read(slot, number, piece)
        self._enqueue(slot)

    def finish(self) -> ComputedChunk:
        """The chunk begun first; its buffers stay until RING_SLOTS more have begun."""
        slot = self._busy.popleft()
        self._device.synchronize(slot.done)
        on_gpu = {part.number: sweep.statistics(part.measured) for part in slot.parts if part.measured is not None}
        self._free.append(slot)
        return ComputedChunk(slot.buffers, slot.measured | on_gpu)

    def close(self) -> None:
        """Wait for what is under way: its memory is about to go."""
        try:
            for stream in (self._up, self._compute, self._down):
                self._device.drain(stream)
        except Exception:
            _undrained.append(self)
            raise

    def _read(self, slot: Slot, number: int, piece: Piece) -> None:
        """Read a piece's inputs into the slot, or have the CPU compute it."""
        step, start, stop, at = piece
        outs = [buffer[at : at + stop - start] for buffer in slot.buffers]
        if not _on_gpu(step) or not step.active or stop - start < SMALL:
            moved = self._source.compute(self._cpu, step, start, stop, outs, self._measure)
            if moved is not None:
                slot.measured[number] = moved
            return
        aligned, sft = self._source.spans(step, start, stop)
        part = slot.part(number, piece, self._ratio, sft.stop - sft.start, self._measure)
        for (host, _), span in zip(part.inputs, (sft, aligned), strict=True):
            span.reader.read(span.start, host.numpy().data)
        for k, out in enumerate(outs):
            if k not in step.active:
                out[:] = part.inputs[1][0].numpy().data
        slot.parts.append(part)

    def _enqueue(self, slot: Slot) -> None:
        """Everything of a chunk that the GPU does: the three streams, and two of the three waits."""
        device, parts = self._device, slot.parts
        alphas = [self._constants(tuple(part.step.alphas[k] for k in part.step.active)) for part in parts]

        def upload() -> None:
            for part in parts:
                for host, gpu in part.inputs:
                    gpu.copy_(host, non_blocking=True)

        def compute() -> None:
            try:
                for part, constants in zip(parts, alphas, strict=True):
                    sweep.launch(*extrapolation(*part.operands, constants), part.results, part.partials)
            except OSError as error:  # Triton's, whose cache cannot be written to: no input's, as callers would think
                raise RuntimeError(error_text(error)) from error

        def download() -> None:
            for part in parts:
                for host, gpu in [*part.outputs, *zip(part.measured or (), part.partials or (), strict=True)]:
                    host.copy_(gpu, non_blocking=True)

        device.enqueue(self._up, upload)
        device.wait(self._compute, device.record(self._up))
        device.enqueue(self._compute, compute)
        device.wait(self._down, device.record(self._compute))
        device.enqueue(self._down, download)
        slot.done = device.record(self._down)

    def _constants(self, alphas: tuple[float, ...]) -> torch.Tensor:
        """Alphas on the GPU; a plan has few different ones."""
        if alphas not in self._alphas:
            memory = self._device.memory(4 * len(alphas)).view(torch.float32)
            memory.copy_(torch.tensor(alphas, dtype=torch.float32))  # from pageable memory: done when it returns
            self._alphas[alphas] = memory
        return self._alphas[alphas]


def _on_gpu(step: Step) -> bool:
    return step.plain and step.sft is not None and "F64" not in (step.sft.dtype, step.aligned.dtype)


def _ratio(step: Step) -> int:
    """Bytes of sft for one of aligned, at least 1."""
    assert step.sft is not None
    return max(1, BITS[step.sft.dtype] // BITS[step.aligned.dtype])
