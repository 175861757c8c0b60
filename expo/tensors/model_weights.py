"""The weights of a model in memory: its parameters and persistent buffers, by the names of its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE, torch_names
from ..errors import UsageError
from .distributed_tensors import local_part
from .memory_checks import check_memory

IN_MEMORY = "a live model has all its weights in memory, so load them first"
OFFLOADED = (
    "accelerate has offloaded it, and a live model has all its weights in memory: load the model with a device_map "
    "that offloads nothing, such as device_map='cpu', or on more devices"
)


def saved_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a model's files hold, its parameters and persistent buffers, by the state dict's names.

    A tied weight occurs once, under its first name.
    """
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # an attribute of transformers' models
    weights: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if name not in computed
    }
    memories = {_memory_of(tensor) for tensor in weights.values()}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            unsaved = buffer is None or name in module._non_persistent_buffers_set or full in computed
            if buffer is None or unsaved or _memory_of(buffer) in memories:
                continue
            memories.add(_memory_of(buffer))
            weights[full] = buffer
    return weights


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a value that is equal for two tensors if they are one tensor, or equal views of the same memory."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True)
class ModelInMemory:
    """The tensors of a model in memory, as the matching needs them: see `ModelTensors`."""

    path: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    adapter: None = None
    notes: tuple[str, ...] = ()


def model_tensors(model: torch.nn.Module, role: str) -> ModelInMemory:
    """Return the tensors of a model by name. Raises UsageError for parameters that cannot be rewritten in place.

    A buffer of a dtype that weight files do not hold is left out. The bytes of each TensorInfo are [0, nbytes). The
    TensorInfo of a DTensor describes the whole tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in saved_weights(model).items():
        dtype = torch_names().get(tensor.dtype)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if dtype is None and not is_parameter:
            continue
        check_memory(torch, local_part(tensor), f"{role}: {name}", OFFLOADED if offloads(model) else IN_MEMORY)
        if is_parameter:
            check_weight(tensor, name, role)
        tensors[name] = TensorInfo(name, str(dtype), tuple(tensor.shape), 0, tensor.nbytes)
    if next(model.parameters(), None) is None:
        raise UsageError(f"{role}: the {type(model).__name__} has no parameters, so it is no model")
    config: Any = getattr(model, "config", None)
    return ModelInMemory(role, tensors, config.to_dict() if hasattr(config, "to_dict") else {})


def offloads(model: torch.nn.Module) -> bool:
    """Return True if accelerate moves weights of the model to a device only while a module computes with them."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return any(getattr(hook, "offload", False) for each in hooks for hook in getattr(each, "hooks", (each,)))


def check_weight(tensor: torch.Tensor, name: str, role: str) -> None:
    """Raise UsageError if the kernels cannot read and write the tensor, or this process's part of it, in place."""
    part = local_part(tensor)
    what = "parameters" if isinstance(tensor, torch.nn.Parameter) else "buffers that files hold"
    is_known = torch_names().get(tensor.dtype) in ITEMSIZE
    if not is_known or not part.is_contiguous() or part.layout != torch.strided or part.is_neg():
        raise UsageError(f"{role}: {name} is {tensor.dtype}: {what} must be contiguous bf16, fp16, fp32 or fp64")
