"""out = aligned + alpha * (aligned - sft) on a GPU, in one pass: the Triton kernel and its launcher.

    d = f32(a) - f32(s);  p = alpha * d;  r = f32(a) + p;  out = round-to-nearest-even(r -> dtype of a)

Each fp32 operation rounds once: the launcher forbids fused multiply-adds (enable_fp_fusion=False), and on NVIDIA's GPUs
the product is an instruction that no stage of the compiler may fuse.
Bytes moved per element: itemsize of sft + 2 * itemsize of aligned; 6 for bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .contract import Operand, Term, extrapolation_term

BLOCK = 2048  # elements a program: 16 for each of 128 threads, two 128-bit accesses per bf16 operand
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # of every kernel of this project
LANES = tl.constexpr(8)  # bf16 elements in a 128-bit access


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """To fp32, exactly."""
    if x.dtype == tl.bfloat16:
        # Through integers, which the compiler folds into one instruction for each half of a register.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(a, d, alpha, dtype: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the formula's result, from a and d in fp32; PTX: see `ptx`."""
    if PTX:
        # For Blackwell LLVM packs two products and two sums, and ptxas 12.8 and 12.9 fuse the packed ones whatever they
        # are told. They leave alone what stands in inline assembly.
        p = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [d, alpha], tl.float32, is_pure=True, pack=1)
    else:
        p = alpha * d
    return (a + p).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def write(sft_ptr, aligned_ptr, out_ptr, alpha, at, inside, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the results of the elements `at`, where `inside`; of all of them for None."""
    sft = tl.load(sft_ptr + at, mask=inside)
    aligned = tl.load(aligned_ptr + at, mask=inside)
    a = widen(aligned)
    d = a - widen(sft)
    tl.store(out_ptr + at, rounded(a, d, alpha, out_ptr.dtype.element_ty, PTX), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def block(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, left, alpha, BLOCK: tl.constexpr, PTX: tl.constexpr
):
    """Write the results of the first BLOCK elements, or of the `left` ones that there are, none where `left` <= 0."""
    at = tl.arange(0, BLOCK)
    if left >= BLOCK:
        write(sft_ptr, aligned_ptr, out_ptr, alpha, at, None, PTX)
    else:
        # A bound that the compiler sees to be a multiple of 8: a mask against any other allows 2-byte accesses alone.
        body = (left.to(tl.int32) // LANES) * LANES  # towards zero, so that the tail of a negative one is empty too
        write(sft_ptr, aligned_ptr, out_ptr, alpha, at, at < body, PTX)
        tail = body + tl.arange(0, LANES)
        write(sft_ptr, aligned_ptr, out_ptr, alpha, tail, tail < left, PTX)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def extrapolate(  # type: ignore[no-untyped-def]
    sft_ptr, aligned_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr, PTX: tl.constexpr
):
    """Compute n elements from three addresses, BLOCK for each program; out may be one of the inputs."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 before the multiply: n may be past 2^31
    block(sft_ptr + start, aligned_ptr + start, out_ptr + start, n - start, alpha, BLOCK, PTX)


def launch(anchor: Operand, terms: Sequence[Term], outputs: Sequence[torch.Tensor]) -> None:
    """Run the kernel for the term of ExPO and one output; the memories are contiguous tensors on one device.

    Args:
        anchor: The aligned tensor.
        terms: The term of ExPO, with one coefficient: not 0, and finite in fp32.
        outputs: One tensor of the anchor's shape and dtype, which may be the anchor's or sft's own.

    The dtypes are BF16, F16 and F32 in any mix. The tensors are not checked.

    Raises:
        EngineError: The terms are others.
    """
    (alpha,), _, sft = extrapolation_term("triton", anchor, terms)
    (out,) = outputs
    aligned, n = anchor.memory, anchor.elements
    if n:
        with current(aligned):
            extrapolate[triton.cdiv(n, BLOCK),](sft.memory, aligned, out, n, alpha, BLOCK=BLOCK, PTX=ptx(), **OPTIONS)


def current(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(block, triton.runtime.JITFunction)


def ptx() -> bool:
    """Return whether launches compile to PTX, NVIDIA's assembly: not for AMD's GPUs, and not in the interpreter."""
    return torch.version.hip is None and not interpreted()


def available() -> str:
    """Why the kernels cannot run on this machine, or "" where they can; Triton's interpreter counts."""
    return "" if interpreted() or torch.cuda.is_available() else "torch sees no CUDA device"
