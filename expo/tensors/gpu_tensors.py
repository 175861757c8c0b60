"""Tensors that are on a GPU: the Triton kernels compute them, or torch's own operations if the kernels fail.

execution/gpu_fallback.py handles the kernels' failures and warns about them. The tensors sft, aligned and out of one
call or triple are contiguous, of one shape and on one device; out has aligned's dtype. Every alpha is a result of
`kernels.contract.working_alpha`, and not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from ..errors import EngineError
from ..execution import gpu_fallback
from ..kernels.contract import tensor_extrapolation


def on_gpu(tensor: Any) -> bool:
    """Return True if a tensor is on a device that the kernels run on."""
    return bool(tensor.is_cuda)


def compute(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Write aligned + alpha * (aligned - sft) to out, for tensors on one device that is not the CPU."""
    import torch

    if on_gpu(aligned) and torch.float64 not in (sft.dtype, aligned.dtype):
        compute_by_kernel(sft, aligned, alpha, out)
    else:
        compute_by_torch(sft, aligned, alpha, out)


def compute_by_kernel(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Write what `compute` writes, for tensors on a GPU in the dtypes of the kernels; torch computes if that fails."""
    if not gpu_fallback.attempt(aligned.device, _launch, sft, aligned, alpha, out):
        compute_by_torch(sft.detach(), aligned.detach(), alpha, out.detach())


def _launch(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    _kernel().launch_tensors(sft, aligned, alpha, out)


@cache
def _kernel() -> Any:
    """Return the module of the kernel for one tensor, without an import statement's time at each launch."""
    from ..kernels import extrapolate

    return extrapolate


def compute_by_torch(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Write what `compute` writes, in several passes over memory and without a kernel of this project."""
    from ..kernels import torch_eager

    torch_eager.extrapolate(*tensor_extrapolation(sft, aligned, (alpha,)), [out], False)


def make_table(triples: Iterable[Sequence[Any]]) -> Any:
    """Return the `whole_model.Table` of tensors (sft, aligned, out) on one GPU, or None if none can be made now.

    Making a table copies memory from the host to the GPU, which a CUDA graph cannot capture.
    """
    triples = list(triples)
    device = triples[0][1].device
    if not gpu_fallback.usable(device) or gpu_fallback.capturing(device):
        return None
    from ..kernels.whole_model import Table

    try:
        return Table(*zip(*triples, strict=True))
    except RuntimeError as error:
        if not gpu_fallback.is_out_of_memory(error):
            raise
        gpu_fallback.fall_back(device, error)
        return None


def compute_table(table: Any, alpha: float, tensors_at: Callable[[int], Sequence[Any]]) -> None:
    """Launch the kernel for each group of a table; torch computes a group whose launch fails.

    Args:
        table: A table of `make_table`.
        alpha: The working alpha, which is not 0.
        tensors_at: Returns the tensors (sft, aligned, out) at a position of the triples that the table was made of. The
            caller holds them, because the table does not.
    """
    for group in table.groups:
        if not gpu_fallback.attempt(group.table.device, group.launch, alpha):
            for place in group.places:
                sft, aligned, out = (tensor.detach() for tensor in tensors_at(place))
                compute_by_torch(sft, aligned, alpha, out)


def launch_table(table: Any, alpha: Any) -> None:
    """Launch the kernel for each group of a table and the alpha in a tensor of the GPU, which the host does not read.

    Raises:
        EngineError: The device's kernels are not usable, or a launch failed: torch has no operation that could compute
            in their place, because it gives other bits for alpha 0.
    """
    for group in table.groups:
        device = group.table.device
        if not gpu_fallback.attempt(device, group.launch, alpha):
            raise EngineError(
                f"the Triton kernels cannot be used on {device} now, and an alpha in a tensor needs them: set a number "
                f"as alpha. {gpu_fallback.reason_given_up(device)}".rstrip()
            )


def compute_together(triples: Sequence[Sequence[Any]], alpha: float) -> Any:
    """Compute tensors (sft, aligned, out) on one GPU in few launches, or one by one if no table can be made.

    Returns:
        The table, for later launches; None if none could be made.
    """
    table = make_table(triples)
    if table is not None:
        compute_table(table, alpha, triples.__getitem__)
    else:
        for sft, aligned, out in triples:
            compute(sft, aligned, alpha, out)
    return table
