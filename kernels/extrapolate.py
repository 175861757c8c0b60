"""out = aligned + alpha * (aligned - sft) on a GPU, in one pass: the Triton kernel and its launchers.

    d = f32(a) - f32(s);  p = alpha * d;  r = f32(a) + p;  out = round-to-nearest-even(r -> dtype of a)

Each fp32 operation rounds once: the launcher forbids fused multiply-adds (enable_fp_fusion=False).
Bytes moved per element: itemsize of sft + 2 * itemsize of aligned; 6 for bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .contract import ITEMSIZE, Statistics
from .twin import DTYPES, twin

BLOCK = 2048  # elements a program: 16 for each of 128 threads, two 128-bit accesses per bf16 operand
WARPS = 4
LANES = tl.constexpr(8)  # bf16 elements in a 128-bit access


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(sft, aligned, alpha, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    a = aligned.to(tl.float32)
    d = a - sft.to(tl.float32)
    p = alpha * d
    return (a + p).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _extrapolate(sft_ptr, aligned_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 before the multiply: n may be past 2^31
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # The bound is a multiple of 8, which the compiler sees: a mask against n itself would allow 2-byte accesses alone.
    body = (n // LANES) * LANES
    at = start + tl.arange(0, BLOCK)
    sft = tl.load(sft_ptr + at, mask=at < body)
    aligned = tl.load(aligned_ptr + at, mask=at < body)
    tl.store(out_ptr + at, _rounded(sft, aligned, alpha, dtype), mask=at < body)
    if (start <= body) & (body < start + BLOCK):
        # Names of their own: Triton refuses a branch that gives a variable of the body another shape.
        tail = body + tl.arange(0, LANES)
        sft_tail = tl.load(sft_ptr + tail, mask=tail < n)
        aligned_tail = tl.load(aligned_ptr + tail, mask=tail < n)
        tl.store(out_ptr + tail, _rounded(sft_tail, aligned_tail, alpha, dtype), mask=tail < n)


def launch(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """Run the kernel over contiguous tensors of one shape on one device; out may be sft or aligned.

    dtypes BF16, F16 and F32 in any mix, out of aligned's; alpha not 0 and finite in fp32; nothing is checked.
    """
    n = aligned.numel()
    if n:
        grid = (triton.cdiv(n, BLOCK),)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(aligned.device) if aligned.is_cuda else contextlib.nullcontext():
            _extrapolate[grid](sft, aligned, out, n, alpha, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)


def available() -> str:
    """Why the kernel cannot run on this machine, or "" where it can; Triton's interpreter counts."""
    if isinstance(_extrapolate, triton.runtime.JITFunction) and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def run(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """The kernel, or the twin for F64; contiguous tensors on one device, alpha as `working_alpha` gives it."""
    if torch.float64 in (sft.dtype, aligned.dtype):
        out.copy_(twin(sft, aligned, alpha))
    else:
        launch(sft, aligned, alpha, out)


class HostEngine:
    """The kernel behind the contract's signature: memory of the host in and out, computed on the GPU."""

    def __init__(self, device: str) -> None:
        """device: "cuda[:index]". Raises RuntimeError where the kernel cannot run."""
        reason = available()
        if reason:
            raise RuntimeError(reason)
        interpreted = not isinstance(_extrapolate, triton.runtime.JITFunction)
        self._device = torch.device("cpu" if interpreted else device)
        torch.empty(0, device=self._device)  # an index that is not there fails here, not in the middle of a merge

    def __call__(
        self,
        sft: Any,
        sft_dtype: str,
        aligned: Any,
        aligned_dtype: str,
        n: int,
        outs: Sequence[Any],
        alphas: Sequence[float],
        measure: bool,
    ) -> Statistics | None:
        s, a = self._upload(sft, sft_dtype, n), self._upload(aligned, aligned_dtype, n)
        results = [torch.empty_like(a) for _ in alphas]
        for alpha, result, out in zip(alphas, results, outs, strict=True):
            run(s, a, alpha, result)
            bytes_ = result.view(torch.uint8).cpu().numpy()
            np.frombuffer(out, np.uint8, bytes_.size)[:] = bytes_
        return _statistics(s, a, results) if measure else None

    def _upload(self, memory: Any, dtype: str, n: int) -> torch.Tensor:
        size = n * ITEMSIZE[dtype]
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        host.numpy()[:] = np.frombuffer(memory, np.uint8, size)
        return host.to(self._device).view(DTYPES[dtype])


def _statistics(sft: torch.Tensor, aligned: torch.Tensor, outs: Sequence[torch.Tensor]) -> Statistics:
    work = torch.float64 if torch.float64 in (sft.dtype, aligned.dtype) else torch.float32
    a = aligned.to(work)
    d = a - sft.to(work)
    finite = d.isfinite()
    a, d = a[finite].double(), d[finite].double()
    counts = tuple((int((out != aligned).sum()), int((~out.isfinite()).sum())) for out in outs)
    top = float(d.abs().max()) if d.numel() else 0.0
    return Statistics(float((d * d).sum()), float((a * a).sum()), top, counts)
