"""DTensors of torch.distributed: each process computes the part of the tensor that is in its own memory.

The formula computes each element alone. So the local parts of sft, aligned and out suffice, if the three are
distributed alike. This module imports nothing from torch.distributed: a caller that passes a DTensor has imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=256)
def _is_dtensor(kind: type) -> bool:
    """Return True for DTensor and its subclasses; its module is another one in other versions of torch."""
    return any(each.__name__ == "DTensor" and each.__module__.startswith("torch.distributed") for each in kind.__mro__)


def is_distributed(tensor: Any) -> bool:
    """Return True for a DTensor, of which each process has a part or a copy."""
    return _is_dtensor(type(tensor))  # type: ignore[arg-type]  # mypy takes no type for hashable


def local_part(tensor: Any) -> Any:
    """Return the part of a DTensor that this process has, without autograd; any other tensor is returned as it is."""
    if not is_distributed(tensor):
        return tensor
    import torch

    with torch.no_grad():
        return tensor.to_local().detach()


def check_alike(tensors: Sequence[tuple[str, Any]], advice: str = "") -> None:
    """Raise UsageError unless all tensors are DTensors of one mesh and the same placements, none of them Partial.

    The parts that this process has must also have one shape: a caller can make a DTensor of parts of any sizes.

    Args:
        tensors: The tensors, each after the name that a message gives it.
        advice: The end of the message; without it, an advice for each kind of difference.
    """
    reference, first = next((role, tensor) for role, tensor in tensors if is_distributed(tensor))
    for role, tensor in tensors:
        if is_distributed(tensor) and any(placement.is_partial() for placement in tensor.placements):
            raise UsageError(
                f"{role} is {_describe(tensor)}: the processes have not yet combined its elements: "
                f"{_advice_for_partial(role) if not advice else 'redistribute it to Shard or Replicate first'}"
            )
    for role, tensor in tensors:
        if not is_distributed(tensor):
            fix = f"torch's distribute_tensor({role}, {reference}.device_mesh, {reference}.placements)"
        elif tensor.device_mesh != first.device_mesh:
            fix = f"torch's distribute_tensor({role}.full_tensor(), {reference}.device_mesh, {reference}.placements)"
        elif tuple(tensor.placements) != tuple(first.placements):
            fix = f"{role}.redistribute(placements={reference}.placements)"
        else:
            _check_local_shapes(reference, first, role, tensor)
            continue
        if role.startswith("out"):
            fix = f"torch.empty_like({reference}), or no out"
        raise UsageError(
            f"{reference} is {_describe(first)}, but {role} is {_describe(tensor)}: each process computes its own "
            f"part, so all must be distributed alike: {advice or f'pass {fix}'}"
        )


def _check_local_shapes(reference: str, first: Any, role: str, tensor: Any) -> None:
    """Raise UsageError if this process's parts of two tensors of one shape have different shapes."""
    shapes = [tuple(local_part(each).shape) for each in (first, tensor)]
    if first.shape == tensor.shape and shapes[0] != shapes[1]:
        raise UsageError(
            f"this process's part of {reference} has the shape {shapes[0]}, but that of {role} has the shape "
            f"{shapes[1]}: make both DTensors by torch's distribute_tensor(), fully_shard() or parallelize_module()"
        )


def block_of(role: str, tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the begin and the shape of this process's part in the whole of a DTensor.

    Raises:
        UsageError: A placement is neither Shard nor Replicate, or the caller has made the DTensor of parts of other
            sizes than torch's.
    """
    if all(type(placement).__name__ in ("Shard", "Replicate") for placement in tensor.placements):
        (block,) = tensor.__create_chunk_list__()
        if tuple(block.sizes) == tuple(local_part(tensor).shape):
            return tuple(block.offsets), tuple(block.sizes)
    raise UsageError(
        f"{role} is {_describe(tensor)}, and files are read for Shard and Replicate alone, with parts of the sizes "
        "that distribute_tensor gives: load sft as a second model, distribute it like this model, and give it as sft"
    )


def _advice_for_partial(role: str) -> str:
    """Return the way out for a tensor whose elements are still sums, or other combinations, over the processes."""
    if role.startswith("out"):
        return "pass no out, or an out with the placements of aligned"
    return f"pass {role}.redistribute(placements=[torch.distributed.tensor.Replicate()] * {role}.device_mesh.ndim)"


def _describe(tensor: Any) -> str:
    """Return the placements and the mesh of a tensor, as a message names them."""
    if not is_distributed(tensor):
        return f"a {type(tensor).__name__}, which is no DTensor"
    mesh = tensor.device_mesh
    names = f" with dimensions {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
    return (
        f"a DTensor of placements {tuple(tensor.placements)} on the {mesh.device_type} mesh {mesh.mesh.tolist()}{names}"
    )


def fsdp_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a model that `fully_shard` has wrapped."""
    return [module for module in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)]


def reshard(modules: Sequence[torch.nn.Module]) -> None:
    """Let modules of FSDP register their local parts as parameters again.

    After a forward pass the outermost module keeps whole copies of its parameters. It would compute with these copies
    again, although the local parts have been rewritten.
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]
