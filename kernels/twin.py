"""The numerics contract in torch eager: the Triton kernel's twin, for devices and dtypes that it does not serve.

`contract.py` states the formula. Several passes over memory; the same bits wherever torch's fp32 sub, mul and add round
to nearest even and keep subnormals.
"""

from __future__ import annotations

import torch


def twin(sft: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """Round aligned + alpha * (aligned - sft) once to aligned's dtype; tensors of one shape on one device.

    Separate sub, mul and add: torch.add(a, d, alpha=alpha) would fuse two of them into one rounding.
    """
    work = torch.float64 if torch.float64 in (sft.dtype, aligned.dtype) else torch.float32
    a = aligned.to(work)
    r = torch.add(a, torch.mul(torch.sub(a, sft.to(work)), alpha))
    if work is torch.float64 and aligned.dtype in (torch.bfloat16, torch.float16):
        r = _round_to_odd(r)  # torch narrows fp64 to 16 bits through fp32, which would round twice
    return r.to(aligned.dtype)


def _round_to_odd(r: torch.Tensor) -> torch.Tensor:
    """As numerics.round_to_odd."""
    near = r.to(torch.float32)
    exact = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits -= (exact.abs() > r.abs()).to(torch.int32)
    bits |= ((exact != r) & ~r.isnan()).to(torch.int32)
    return near
