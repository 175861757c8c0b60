"""The Triton kernel for one alpha, out = aligned + alpha * (aligned - sft) in one pass on a GPU, and its launcher.

    d = f32(a) - f32(s);  p = alpha * d;  r = f32(a) + p;  out = round-to-nearest-even(r -> dtype of a)

Each fp32 operation rounds once: the launcher forbids fused multiply-adds (enable_fp_fusion=False), and on NVIDIA's GPUs
the product is an instruction that no stage of the compiler may fuse.
Bytes moved for each element: the itemsize of sft and twice that of aligned, which is 6 for bf16.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .contract import Operand, Term, check_no_scales, extrapolation_term

# A kernel takes this number as BLOCK: 16 elements for each of 128 threads, two 128-bit accesses for a bf16 operand.
PROGRAM_ELEMENTS = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # the options with which every kernel is launched
TAIL_ELEMENTS = tl.constexpr(8)  # a 128-bit access has 8 bf16 elements, so a tail has fewer
_launches = threading.RLock()  # re-entrant: the self-test holds it around its launches


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """Return the block x of bf16, fp16 or fp32 in fp32, which is exact."""
    if x.dtype == tl.bfloat16:
        # The compiler folds these integer operations into one instruction for each half of a register.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(a, d, alpha, dtype: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a + alpha * d from a and d in fp32, rounded to `dtype`; PTX is the value of `ptx()`."""
    if PTX:
        # For Blackwell LLVM packs two products and two sums, and ptxas 12.8 and 12.9 fuse the packed ones in spite of
        # their options. They do not fuse an instruction of inline assembly.
        p = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [d, alpha], tl.float32, is_pure=True, pack=1)
    else:
        p = alpha * d
    return (a + p).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def write_elements(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, alpha, at, inside, MAY_BE_0: tl.constexpr, PTX: tl.constexpr
):
    """Write the results of the elements `at` for which the mask `inside` is true, or of all if `inside` is None.

    If MAY_BE_0 is true and alpha is 0, the results are aligned's bits: a - s may be inf or NaN, and -0 + 0 is 0.
    """
    sft = tl.load(sft_ptr + at, mask=inside)
    aligned = tl.load(aligned_ptr + at, mask=inside)
    a = widen(aligned)
    d = a - widen(sft)
    out = rounded(a, d, alpha, out_ptr.dtype.element_ty, PTX)
    if MAY_BE_0:
        out = tl.where(alpha == 0, aligned, out)
    tl.store(out_ptr + at, out, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def write_block(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, left, alpha, MAY_BE_0: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr
):
    """Write the results of the first min(BLOCK, left) elements; `left` is the number of elements from here to the end.

    If `left` is 0 or negative, nothing is written.
    """
    at = tl.arange(0, BLOCK)
    if left >= BLOCK:
        write_elements(sft_ptr, aligned_ptr, out_ptr, alpha, at, None, MAY_BE_0, PTX)
    else:
        # The compiler sees that this bound is a multiple of 8, and uses 128-bit accesses. With any other bound it would
        # use 2-byte accesses only. The division rounds towards zero, so the tail is empty if the number is negative.
        body = (left.to(tl.int32) // TAIL_ELEMENTS) * TAIL_ELEMENTS
        write_elements(sft_ptr, aligned_ptr, out_ptr, alpha, at, at < body, MAY_BE_0, PTX)
        tail = body + tl.arange(0, TAIL_ELEMENTS)
        write_elements(sft_ptr, aligned_ptr, out_ptr, alpha, tail, tail < left, MAY_BE_0, PTX)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def extrapolate(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr, PTX: tl.constexpr
):
    """Compute n elements, BLOCK in each program; out_ptr may be one of the two input addresses."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 before the multiplication: n may be past 2^31
    write_block(sft_ptr + start, aligned_ptr + start, out_ptr + start, n - start, alpha, False, BLOCK, PTX)


def launch(anchor: Operand, terms: Sequence[Term], outputs: Sequence[torch.Tensor]) -> None:
    """Run the kernel for the term of ExPO and one output; the memories are contiguous tensors on one device.

    Args:
        anchor: The aligned tensor.
        terms: The term of ExPO, with one coefficient: not 0, and finite in fp32.
        outputs: One tensor of the anchor's shape and dtype, which may be the tensor aligned or sft itself.

    The dtypes are BF16, F16 and F32 in any mix. The caller checks the tensors; this function does not.

    Raises:
        EngineError: The arguments are not those of ExPO.
    """
    (alpha,), _, sft = extrapolation_term("triton", anchor, terms)
    check_no_scales(anchor, terms)
    (out,) = outputs
    launch_tensors(sft.memory, anchor.memory, alpha, out)


def launch_tensors(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """Run the kernel as `launch` does, for tensors: operands would take 6 microseconds to make and to check.

    Args:
        sft: A contiguous tensor.
        aligned: Another one of the same shape and device.
        alpha: A number that is not 0, and finite in fp32.
        out: A tensor of aligned's shape, dtype and device, which may be aligned or sft itself.
    """
    n = aligned.numel()
    if n:
        with launching(aligned):
            # triton.cdiv would take 2 microseconds on the host, and constants by name would take one.
            grid = (-(-n // PROGRAM_ELEMENTS),)
            extrapolate[grid](sft, aligned, out, n, alpha, PROGRAM_ELEMENTS, ptx(), **OPTIONS)


def launching(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context for a launch: the tensor's device is the current one, and no other thread launches meanwhile.

    Triton compiles a kernel at its first launch. Two threads that do so at the same time would compile it twice, and
    Python 3.11 fails where two threads parse a kernel's source together ("AST constructor recursion depth mismatch").
    The lock alone is the context if the device is the current one already: that saves 1.5 microseconds at each launch.
    """
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return _launching_on(tensor.device)
    return _launches


@contextlib.contextmanager
def _launching_on(device: torch.device) -> Iterator[None]:
    with _launches, torch.cuda.device(device):
        yield


def interpreted() -> bool:
    """Return True if Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(write_block, triton.runtime.JITFunction)


def ptx() -> bool:
    """Return True if launches compile to PTX, NVIDIA's assembly: not for AMD's GPUs, and not in the interpreter."""
    return torch.version.hip is None and not interpreted()


def why_unavailable() -> str:
    """Return the reason why the kernels cannot run on this machine; "" if they can, on a GPU or in the interpreter."""
    return "" if interpreted() or torch.cuda.is_available() else "torch sees no CUDA device"
