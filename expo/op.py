"""torch.ops.expo.extrapolate: the formula as an operator that torch.compile and torch.export treat as one node.

`import expo.op` registers the operator. `import expo` registers it too if torch has been imported before.
"""

# This module has no `from __future__ import annotations`, because torch before 2.5 cannot read a schema from strings.

from typing import Any

import torch

from .errors import UsageError
from .tensors.arrays import extrapolate as _extrapolate


@torch.library.custom_op("expo::extrapolate", mutates_args=())
def extrapolate(sft: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return `expo.extrapolate(sft, aligned, alpha)`, computed by the CPU's engine or by the Triton kernel on a GPU.

    Unlike `expo.extrapolate`, this operator is differentiable: the gradient of aligned is (1 + alpha) times the
    output's gradient, and that of sft is -alpha times the output's gradient.
    """
    return _extrapolate(sft, aligned, alpha)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    """Save the values that the gradients need."""
    ctx.sft_dtype, ctx.alpha = inputs[0].dtype, inputs[2]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Return the gradients of sft, aligned and alpha."""
    return (gradient * -ctx.alpha).to(ctx.sft_dtype), gradient * (1 + ctx.alpha), None


extrapolate.register_autograd(_backward, setup_context=_save)


@extrapolate.register_fake
def _(sft: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    _check(sft, aligned)
    return torch.empty_like(aligned)


@torch.library.custom_op("expo::extrapolate_", mutates_args=("out",))
def extrapolate_(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """Compute `expo.extrapolate(sft, aligned, alpha, out=out)`; torch does not allow `out` to be one of the inputs."""
    _extrapolate(sft, aligned, alpha, out=out)


@extrapolate_.register_fake
def _(sft: torch.Tensor, aligned: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    _check(sft, aligned)
    _check(aligned, out)


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    """Raise UsageError if the shapes or the devices differ."""
    if first.shape != second.shape or first.device != second.device:
        raise UsageError(
            f"shapes and devices must be equal, got {tuple(first.shape)} on {first.device} and "
            f"{tuple(second.shape)} on {second.device}"
        )
