"""The lane of a GPU: bytes go from the files through pinned memory to the GPU, and back through pinned memory.

The lane has a ring of slots, each with buffers of its own on the host and on the GPU, and three streams: for uploads
(from the host to the GPU), kernels, and downloads (from the GPU to the host). While the worker writes one chunk, the
outputs of the next chunk are downloaded, and a third chunk is uploaded or computed. A slot is filled again only after
the host has waited for its last download, so three waits are enough for a chunk: its kernels wait for its uploads, its
downloads wait for its kernels, and the host waits for its downloads. Every input is uploaded once, and every output
downloaded once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..dtypes import BITS, ITEMSIZE, torch_dtypes
from ..kernels import sweep
from ..kernels.contract import EngineFunction, Operand, extrapolation
from ..kernels.sweep import Partials
from ..memory import page_aligned
from ..planning.plan import Plan
from ..planning.shards import Chunk, ChunkStatistics, Piece
from ..planning.steps import Step
from .engines import choose
from .gpu_fallback import error_text, has_kernel
from .lanes import ComputedChunk, write_header
from .tensor_source import TensorSource

# Lanes whose GPU does not work any more stay in this list, because torch aborts the process if it frees their memory.
_undrained: list[GpuLane] = []
LEAST_GPU_BYTES = 64 << 10  # the CPU computes a smaller piece in less time than the launch of a kernel takes
# On the GPU every piece starts at a multiple of so many bytes, which are 16 elements of the widest dtype. So the kernel
# has wide accesses for every piece, and Triton compiles it once for each pair of dtypes and number of outputs.
ALIGNMENT = 64


class Device(Protocol):
    """The operations of a GPU that a lane needs; `kernels.device.Cuda` has them."""

    def pinned(self, size: int) -> torch.Tensor: ...
    def memory(self, size: int) -> torch.Tensor: ...
    def stream(self) -> Any: ...
    def enqueue(self, stream: Any, work: Callable[[], None]) -> None: ...
    def record(self, stream: Any) -> Any: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize(self, event: Any) -> None: ...
    def drain(self, stream: Any) -> None: ...


class GpuPiece(NamedTuple):
    """A piece that the GPU computes, with the views of a slot's buffers that it needs.

    Attributes:
        number: The number of the piece in its chunk.
        step: The step that the piece belongs to.
        inputs: The bytes of sft and of aligned, each on the host and on the GPU.
        operands: The operands sft and aligned on the GPU.
        results: The outputs that differ from aligned, on the GPU, of shape (outputs, elements).
        outputs: The bytes of these outputs, each on the host and on the GPU.
        gpu_partials: The memory of the statistics on the GPU; None if nothing is measured.
        host_partials: The memory on the host that the statistics are downloaded to; None if nothing is measured.
    """

    number: int
    step: Step
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    operands: tuple[Operand, Operand]
    results: torch.Tensor
    outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    gpu_partials: Partials | None
    host_partials: Partials | None


class SlotBuffers(NamedTuple):
    """The uint8 buffers of a slot on the host, or those of the same sizes on the GPU.

    Attributes:
        sft: The bytes of sft.
        aligned: The bytes of aligned.
        sums: The memory of `Partials.sums`, for all pieces of a chunk.
        counts: The memory of `Partials.counts`, for all pieces of a chunk.
    """

    sft: torch.Tensor
    aligned: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def partials(self, first: int, rows: int, alphas: int, outputs: int) -> Partials:
        """Return the memory of the statistics of some rows.

        Args:
            first: The number of the first row.
            rows: The number of rows.
            alphas: The number of outputs that are counted.
            outputs: The number of all outputs: each row of the buffer has room for so many counts.
        """
        counts = self.counts.view(torch.int32)[first * outputs : first * outputs + rows * alphas]
        return Partials(self.sums.view(torch.float32).view(-1, 3)[first : first + rows], counts.view(-1, alphas))


class Slot:
    """The buffers of one chunk, and the state of the work on it."""

    def __init__(self, device: Device, size: int, sft_size: int, outputs: int) -> None:
        """Allocate the buffers.

        Args:
            device: The GPU.
            size: Bytes of the largest chunk of one output.
            sft_size: Bytes of sft for such a chunk.
            outputs: The number of outputs.
        """
        # At most: 2 for each program of 2-byte elements, and 8 more for each piece, for its tail and for `place`.
        pieces = size // LEAST_GPU_BYTES + 1
        rows = 2 * size // sweep.PROGRAM_ELEMENTS + 8 * pieces
        partials = rows * 12, rows * 4 * outputs
        gaps = ALIGNMENT * pieces
        self.host = SlotBuffers(*map(device.pinned, (sft_size, size, *partials)))
        self.gpu = SlotBuffers(*map(device.memory, (sft_size + gaps, size + gaps, *partials)))
        self.outs = [device.pinned(size) for _ in range(outputs)]
        self.results = device.memory(outputs * (size + gaps)).view(outputs, size + gaps)
        self.buffers = [out.numpy().data for out in self.outs]
        self.done: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget the pieces of the last chunk."""
        self.pieces: list[GpuPiece] = []
        self.measured: ChunkStatistics = {}  # the statistics of the pieces that the CPU computed
        self.cpu_bytes = 0  # bytes of the outputs that the CPU computed or copied
        self._rows = self._sft_bytes = self._aligned_bytes = 0  # the parts of the GPU's buffers that are in use

    def place(self, number: int, piece: Piece, ratio: int, sft_bytes: int, measure: bool) -> GpuPiece:
        """Return the views of the buffers that a piece needs.

        Args:
            number: The number of the piece in its chunk.
            piece: The piece, whose bytes of aligned have the size of its output.
            ratio: The offset of the piece in the host's buffer of sft, divided by its offset in that of aligned.
            sft_bytes: The size of the piece's part of sft.
            measure: True if the piece needs memory for statistics.
        """
        step, start, stop, at = piece
        assert step.sft is not None
        size, dtype = stop - start, torch_dtypes()[step.aligned.dtype]
        sft = self.gpu.sft[self._sft_bytes :][:sft_bytes]
        aligned = self.gpu.aligned[self._aligned_bytes :][:size]
        results = self.results[: len(step.active), self._aligned_bytes :][:, :size]
        self._sft_bytes += _round_up(sft_bytes, ALIGNMENT)
        self._aligned_bytes += _round_up(size, ALIGNMENT)
        rows = sweep.partial_rows(size // ITEMSIZE[step.aligned.dtype])
        first, self._rows = self._rows, self._rows + _round_up(rows, 4)  # so that every piece's rows start at 16 bytes
        return GpuPiece(
            number,
            step,
            inputs=[(self.host.sft[at * ratio :][:sft_bytes], sft), (self.host.aligned[at:][:size], aligned)],
            operands=(
                Operand(sft.view(torch_dtypes()[step.sft.dtype]), step.sft.dtype),
                Operand(aligned.view(dtype), step.aligned.dtype),
            ),
            results=results.view(dtype),
            outputs=[(self.outs[k][at:][:size], row) for k, row in zip(step.active, results, strict=True)],
            gpu_partials=self.gpu.partials(first, rows, len(results), len(self.outs)) if measure else None,
            host_partials=self.host.partials(first, rows, len(results), len(self.outs)) if measure else None,
        )


class GpuLane:
    """The lane of an engine on a GPU (see `lanes.Lane`), with a ring of `depth` slots."""

    def __init__(self, device: Device, plan: Plan, source: TensorSource, size: int, measure: bool, depth: int) -> None:
        """Allocate the ring.

        Args:
            device: The GPU.
            plan: The plan whose chunks the lane computes.
            source: The bytes of both inputs.
            size: Bytes of the largest chunk.
            measure: True to return statistics of every piece.
            depth: The number of slots of the ring.

        Raises:
            RuntimeError: The GPU or the host has too little free memory.
        """
        self.depth = depth
        self._device = device
        self._cpu = choose("auto", "cpu")  # for F64 and for small pieces
        self._source = source
        self._measure = measure
        self._ratio = max([1, *(_ratio(step) for step in plan.steps if _on_gpu(step, step.nbytes))])
        self._free = deque(Slot(device, size, size * self._ratio, len(plan.alphas)) for _ in range(depth))
        self._up, self._compute, self._down = (device.stream() for _ in range(3))
        self._alpha_tensors: dict[tuple[float, ...], torch.Tensor] = {}
        self._busy: deque[Slot] = deque()

    def begin(self, chunk: Chunk) -> None:
        """Read a chunk's inputs and start its computation; at most `depth` chunks may be under way."""
        slot = self._free.popleft()
        self._busy.append(slot)
        slot.clear()
        write_header(chunk, slot.buffers)
        for number, piece in enumerate(chunk.pieces):
            self._read(slot, number, piece)
        self._enqueue(slot)

    def finish(self) -> ComputedChunk:
        """Return the chunk that was begun first; its buffers stay as they are until `depth` more have begun."""
        slot = self._busy.popleft()
        self._device.synchronize(slot.done)
        on_gpu = {
            piece.number: sweep.statistics(piece.host_partials)
            for piece in slot.pieces
            if piece.host_partials is not None
        }
        self._free.append(slot)
        others = {self._cpu.name: slot.cpu_bytes} if slot.cpu_bytes else {}
        return ComputedChunk(slot.buffers, slot.measured | on_gpu, others)

    def close(self) -> None:
        """Wait for the work on all three streams, so that its memory can be freed."""
        try:
            for stream in (self._up, self._compute, self._down):
                self._device.drain(stream)
        except Exception:
            _undrained.append(self)
            raise

    def _read(self, slot: Slot, number: int, piece: Piece) -> None:
        """Read a piece's inputs into the slot, or compute the piece on the CPU."""
        step, start, stop, at = piece
        outs = [buffer[at : at + stop - start] for buffer in slot.buffers]
        if not _on_gpu(step, stop - start):
            statistics = self._source.compute(self._cpu, step, start, stop, outs, self._measure)
            if statistics is not None:
                slot.measured[number] = statistics
            slot.cpu_bytes += (stop - start) * len(outs)
            return
        aligned, sft = self._source.spans(step, start, stop)
        placed = slot.place(number, piece, self._ratio, sft.stop - sft.start, self._measure)
        for (host, _), span in zip(placed.inputs, (sft, aligned), strict=True):
            span.reader.read(span.start, host.numpy().data)
        for k, out in enumerate(outs):
            if k not in step.active:
                out[:] = placed.inputs[1][0].numpy().data
                slot.cpu_bytes += stop - start
        slot.pieces.append(placed)

    def _enqueue(self, slot: Slot) -> None:
        """Enqueue the GPU's work on a chunk on the three streams, with two of the three waits."""
        device, pieces = self._device, slot.pieces
        alphas = [self._alphas_on_gpu(tuple(piece.step.alphas[k] for k in piece.step.active)) for piece in pieces]

        def upload() -> None:
            for piece in pieces:
                for host, gpu in piece.inputs:
                    gpu.copy_(host, non_blocking=True)

        def compute() -> None:
            try:
                for piece, alphas_of_piece in zip(pieces, alphas, strict=True):
                    sweep.launch(*extrapolation(*piece.operands, alphas_of_piece), piece.results, piece.gpu_partials)
            except OSError as error:  # of Triton's cache; callers take an OSError for an error of an input
                raise RuntimeError(error_text(error)) from error

        def download() -> None:
            for piece in pieces:
                partials = zip(piece.host_partials or (), piece.gpu_partials or (), strict=True)
                for host, gpu in [*piece.outputs, *partials]:
                    host.copy_(gpu, non_blocking=True)

        device.enqueue(self._up, upload)
        device.wait(self._compute, device.record(self._up))
        device.enqueue(self._compute, compute)
        device.wait(self._down, device.record(self._compute))
        device.enqueue(self._down, download)
        slot.done = device.record(self._down)

    def _alphas_on_gpu(self, alphas: tuple[float, ...]) -> torch.Tensor:
        """Return alphas as an fp32 tensor on the GPU, kept for later chunks: a plan has few different alphas."""
        if alphas not in self._alpha_tensors:
            memory = self._device.memory(4 * len(alphas)).view(torch.float32)
            memory.copy_(torch.tensor(alphas, dtype=torch.float32))  # a copy from pageable memory is done on return
            self._alpha_tensors[alphas] = memory
        return self._alpha_tensors[alphas]


def compile_kernels(device: torch.device, plan: Plan, direct: EngineFunction | None = None) -> None:
    """Compile the kernels that the lanes of a GPU launch for a plan, with statistics, as a merge measures them.

    Args:
        device: The GPU.
        plan: The plan.
        direct: The engine of a GPU that computes in the host's memory; None for the kernels of a GpuLane.

    Raises:
        Exception: A kernel cannot be compiled or launched; an error of a compiler may have any type.
    """
    kernels = set()
    for step in plan.steps:
        if step.sft is not None and _on_gpu(step, step.nbytes):
            kernels.add((step.sft.dtype, step.aligned.dtype, len(step.active)))
    for sft, aligned, alphas in sorted(kernels):
        if direct is None:
            sweep.compile_for(sft, aligned, alphas, True, device)
        else:
            compile_direct(direct, sft, aligned, alphas)


def compile_direct(direct: EngineFunction, sft: str, aligned: str, alphas: int) -> None:
    """Compile the kernel for memory of the host, aligned to 16 bytes or not, by two runs for 16 elements."""
    for shift in (0, ITEMSIZE[aligned]):
        size = 16 * ITEMSIZE[aligned]
        inputs = Operand(page_aligned(16 * ITEMSIZE[sft]), sft), Operand(page_aligned(2 * size)[shift:][:size], aligned)
        memory = page_aligned(alphas * size)
        outs = [memory[k * size :][:size] for k in range(alphas)]
        direct(*extrapolation(*inputs, (1.0,) * alphas), outs, True)


def _on_gpu(step: Step, size: int) -> bool:
    """Return True if the GPU computes a piece of `size` bytes of the step."""
    return has_kernel(step) and bool(step.active) and size >= LEAST_GPU_BYTES


def _round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def _ratio(step: Step) -> int:
    """Return the number of bytes of sft for each byte of aligned; 1 if sft has fewer."""
    assert step.sft is not None
    return max(1, BITS[step.sft.dtype] // BITS[step.aligned.dtype])
