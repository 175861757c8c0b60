"""The Triton kernel for K alphas from one read of the inputs, with statistics on request, and its launcher.

    d = f32(a) - f32(s);  out[k] = round-to-nearest-even(f32(a) + alpha[k] * d)     as in extrapolate.py

Bytes moved for each element: the itemsize of sft and 1 + K times that of aligned, which is 4 + 2K for bf16. Statistics
add 12 + 4K bytes for every 2048 elements: sums of a part in fp32, and counts. `statistics` adds them up in fp64 and in
a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dtypes import torch_dtypes
from .contract import Operand, Statistics, Term, check_no_scales, extrapolation_term, tensor_extrapolation
from .extrapolate import OPTIONS, TAIL_ELEMENTS, launching, ptx, rounded, widen

PART_ELEMENTS = 2048  # the elements that a program computes at a time: 16 for each of 128 threads
PROGRAM_ELEMENTS = 2 * PART_ELEMENTS  # the kernel's BLOCK: two parts share the cost of K addresses


@triton.jit
def _measure(a, d, sums_ptr):  # type: ignore[no-untyped-def]
    """Store the sum of d*d, the sum of a*a and the largest |d| over the elements whose d is finite."""
    finite = tl.abs(d) < float("inf")
    d = tl.where(finite, d, 0.0)
    a = tl.where(finite, a, 0.0)
    tl.store(sums_ptr, tl.sum(d * d, 0))
    tl.store(sums_ptr + 1, tl.sum(a * a, 0))
    tl.store(sums_ptr + 2, tl.max(tl.abs(d), 0))


@triton.jit
def _count(a, out, counts_ptr):  # type: ignore[no-untyped-def]
    """Store the number of outputs that differ from a in value, plus 2^16 times the number that are inf or NaN."""
    value = widen(out)
    changed = (value != a).to(tl.int32)
    finite = (tl.abs(value) < float("inf")).to(tl.int32)
    tl.store(counts_ptr, tl.sum(changed + ((1 - finite) << 16), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _write_elements(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, pitch, alphas_ptr, sums_ptr, counts_ptr, row, at, inside,
    K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Write the results and the statistics of the elements `at` for which the mask `inside` is true (None: for all).

    The statistics go into row `row` of sums_ptr and counts_ptr; if these are None, there are none.
    """
    if inside is None:
        sft = tl.load(sft_ptr + at)
        aligned = tl.load(aligned_ptr + at)
    else:
        # The zeros outside the mask add nothing to the statistics.
        sft = tl.load(sft_ptr + at, mask=inside, other=0.0)
        aligned = tl.load(aligned_ptr + at, mask=inside, other=0.0)
    a = widen(aligned)
    d = a - widen(sft)
    if sums_ptr is not None:
        _measure(a, d, sums_ptr + row * 3)
    for k in tl.static_range(K):
        out = rounded(a, d, tl.load(alphas_ptr + k), out_ptr.dtype.element_ty, PTX)
        tl.store(out_ptr + k * pitch + at, out, mask=inside)
        if sums_ptr is not None:
            _count(a, out, counts_ptr + row * K + k)


@triton.jit  # type: ignore[untyped-decorator]
def _write_program(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, alphas_ptr, sums_ptr, counts_ptr, n, pitch,
    K: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Compute the elements of this program: BLOCK of the n elements in two parts, or those that are left."""
    PART: tl.constexpr = BLOCK // 2
    row = tl.program_id(0).to(tl.int64) * 2
    start = row * PART
    sft_ptr += start
    aligned_ptr += start
    out_ptr += start
    left = n - start
    pitch = tl.cast(pitch, tl.int64)  # Triton passes an int32 if the pitch fits, and K times the pitch may not fit
    if left >= BLOCK:
        for part in tl.static_range(2):
            at = part * PART + tl.arange(0, PART)
            _write_elements(
                sft_ptr, aligned_ptr, out_ptr, pitch, alphas_ptr, sums_ptr, counts_ptr, row + part, at, None, K, PTX
            )
    else:
        body = (left.to(tl.int32) // TAIL_ELEMENTS) * TAIL_ELEMENTS
        for part in tl.static_range(2):
            here = part * PART + tl.arange(0, PART)
            _write_elements(
                sft_ptr, aligned_ptr, out_ptr, pitch, alphas_ptr, sums_ptr, counts_ptr, row + part,
                here, here < body, K, PTX,
            )  # fmt: skip
        tail = body + tl.arange(0, TAIL_ELEMENTS)
        _write_elements(
            sft_ptr, aligned_ptr, out_ptr, pitch, alphas_ptr, sums_ptr, counts_ptr, row + 2, tail, tail < left, K, PTX
        )


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def sweep(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, alphas_ptr, sums_ptr, counts_ptr, n, pitch,
    K: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Compute n elements, BLOCK in each program in two parts; output k starts k * pitch elements after out_ptr.

    If sums_ptr and counts_ptr are not None, the kernel writes statistics there, in rows of 3 and of K numbers: one row
    for each part, and one row for the tail.
    """
    _write_program(sft_ptr, aligned_ptr, out_ptr, alphas_ptr, sums_ptr, counts_ptr, n, pitch, K, BLOCK, PTX)


@triton.jit(do_not_specialize=["sft", "aligned", "out", "n", "pitch"])  # type: ignore[untyped-decorator]
def sweep_addresses(  # type: ignore[no-untyped-def]
    sft, aligned, out, alphas_ptr, sums_ptr, counts_ptr, n, pitch,
    SFT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNMENT: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Compute as `sweep` does, for addresses in int64 of elements of the dtypes SFT and ALIGNED.

    The addresses, and the bytes between two outputs, are multiples of ALIGNMENT. Triton refuses a pointer to memory
    that CUDA does not know, such as a mapped file, and takes a number.
    """
    sft_ptr = tl.multiple_of(sft.to(tl.int64).to(tl.pointer_type(tl.constexpr(SFT).value)), ALIGNMENT)
    aligned_ptr = tl.multiple_of(aligned.to(tl.int64).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    out_ptr = tl.multiple_of(out.to(tl.int64).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    _write_program(sft_ptr, aligned_ptr, out_ptr, alphas_ptr, sums_ptr, counts_ptr, n, pitch, K, BLOCK, PTX)


class Partials(NamedTuple):
    """The statistics of one launch as the kernel writes them.

    Attributes:
        sums: fp32 of shape (rows, 3).
        counts: int32 of shape (rows, K).
    """

    sums: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, n: int, alphas: int, device: torch.device) -> Partials:
        """Allocate memory on a device for the statistics of n elements and of K = `alphas` outputs."""
        rows = partial_rows(n)
        sums = torch.empty((rows, 3), dtype=torch.float32, device=device)
        return cls(sums, torch.empty((rows, alphas), dtype=torch.int32, device=device))


def partial_rows(n: int) -> int:
    """Return the number of rows for n elements: one for each part of each program, and one for the tail, if any."""
    return 2 * -(-n // PROGRAM_ELEMENTS) + (n % PROGRAM_ELEMENTS > 0)


def launch(anchor: Operand, terms: Sequence[Term], outputs: torch.Tensor, partials: Partials | None = None) -> None:
    """Run the kernel for the term of ExPO; the memories are contiguous tensors on one device.

    Args:
        anchor: The aligned tensor, of n elements.
        terms: The term of ExPO. Its coefficients are a tensor on the same device: fp32 of shape (K,), none 0, all
            finite.
        outputs: A tensor of shape (K, n) and the anchor's dtype. Each row is contiguous; the stride between rows is
            any, but a multiple of 16 elements keeps the stores wide. With K = 1 the output may be the memory of an
            input.
        partials: The memory of the statistics, as `Partials.empty` makes it, or None.

    The dtypes are BF16, F16 and F32 in any mix. The caller checks the tensors; this function does not.

    Raises:
        EngineError: The arguments are not those of ExPO.
    """
    alphas, _, sft = extrapolation_term("triton", anchor, terms)
    check_no_scales(anchor, terms)
    aligned, n = anchor.memory, anchor.elements
    sums, counts = partials or (None, None)
    if n:
        with launching(aligned):
            sweep[triton.cdiv(n, PROGRAM_ELEMENTS),](
                sft.memory, aligned, outputs, alphas, sums, counts, n, outputs.stride(0),
                K=len(alphas), BLOCK=PROGRAM_ELEMENTS, PTX=ptx(), **OPTIONS,
            )  # fmt: skip


def compile_for(sft: str, aligned: str, alphas: int, measure: bool, device: torch.device) -> None:
    """Compile the kernel by a launch for 16 elements, and wait until the device has run it.

    Triton compiles a kernel once more for addresses that are not multiples of 16 bytes, and for a stride between the
    outputs that is no multiple of 16 elements. The launch has such addresses and such a stride that both are multiples.

    Args:
        sft: The dtype of sft: BF16, F16 or F32.
        aligned: The dtype of aligned.
        alphas: The number of outputs.
        measure: True for the kernel with statistics.
        device: The GPU.

    Raises:
        Exception: The kernel cannot be compiled or launched; an error of a compiler may have any type.
    """
    s, a = (torch.zeros(16, dtype=torch_dtypes()[dtype], device=device) for dtype in (sft, aligned))
    ones = torch.ones(alphas, dtype=torch.float32, device=device)
    outputs = a.new_empty((alphas, 16))
    partials = Partials.empty(16, alphas, device) if measure else None
    launch(*tensor_extrapolation(s, a, ones), outputs, partials)
    outputs.cpu()


def statistics(partials: Partials) -> Statistics:
    """Return the contract's statistics from partials on the host, added in fp64 in the order of the elements."""
    sums, counts = partials.sums.double().numpy(), partials.counts.long().numpy()
    d_squared, aligned_squared, _ = sums.sum(0)
    by_alpha = zip((counts & 0xFFFF).sum(0).tolist(), (counts >> 16).sum(0).tolist(), strict=True)
    return Statistics(float(d_squared), float(aligned_squared), float(sums[:, 2].max(initial=0.0)), tuple(by_alpha))
