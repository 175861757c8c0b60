"""torch.ops.expo.extrapolate: the formula as an operator, which torch.compile and torch.export take as one node.

`import expo.op` registers it; so does `import expo` where torch has been imported before.
"""

# No `from __future__ import annotations`: torch before 2.5 reads a schema from annotations, not from their text.

from typing import Any

import torch

from .errors import UsageError
from .tensors.arrays import extrapolate as _extrapolate


@torch.library.custom_op("expo::extrapolate", mutates_args=())
def extrapolate(sft: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """As `expo.extrapolate(sft, aligned, alpha)`: by the CPU's engine, or on a GPU by the Triton kernel.

    Unlike that one, differentiable: the gradients are (1 + alpha) and -alpha times the output's.
    """
    return _extrapolate(sft, aligned, alpha)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.sft_dtype, ctx.alpha = inputs[0].dtype, inputs[2]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return (gradient * -ctx.alpha).to(ctx.sft_dtype), gradient * (1 + ctx.alpha), None


extrapolate.register_autograd(_backward, setup_context=_save)


@extrapolate.register_fake
def _(sft: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    _check(sft, aligned)
    return torch.empty_like(aligned)


@torch.library.custom_op("expo::extrapolate_", mutates_args=("out",))
def extrapolate_(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """As `expo.extrapolate(sft, aligned, alpha, out=out)`; out may not be one of the inputs, by torch's rules."""
    _extrapolate(sft, aligned, alpha, out=out)


@extrapolate_.register_fake
def _(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    _check(sft, aligned)
    _check(aligned, out)


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape or first.device != second.device:
        raise UsageError(
            f"shapes and devices must be equal, got {tuple(first.shape)} on {first.device} and "
            f"{tuple(second.shape)} on {second.device}"
        )
