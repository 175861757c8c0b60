"""The weights of a model in memory: its parameters and persistent buffers, by the names of its state dict."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE, torch_names
from ..errors import UsageError
from .memory_checks import check_memory

IN_MEMORY = "a live model has all its weights in the memory of one process, so load the whole model there"


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


class WeightPositions:
    """The places of a model's parameters and of some of its buffers in the model's modules, and their addresses.

    A live model asks before each launch if the addresses have changed. They are read from the modules' own dictionaries
    in loops that run in C: for 291 parameters, `model.parameters()` would take thirty times as long as a launch.
    """

    def __init__(self, model: torch.nn.Module, buffers: Collection[str]) -> None:
        """Remember the parameters, and the buffers whose names in the model are in `buffers`."""
        self._dictionaries: list[dict[str, Any]] = []
        self._names: list[str] = []
        for prefix, module in model.named_modules():
            parameters = [name for name, parameter in module._parameters.items() if parameter is not None]
            saved = [name for name in module._buffers if (f"{prefix}.{name}" if prefix else name) in buffers]
            self._dictionaries += [module._parameters] * len(parameters) + [module._buffers] * len(saved)
            self._names += parameters + saved
        self._former_addresses = self._addresses()

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, map(operator.getitem, self._dictionaries, self._names)))

    def changed(self) -> bool:
        """Return True if a tensor was replaced, moved or removed."""
        try:
            return self._addresses() != self._former_addresses
        except (KeyError, TypeError):  # a tensor was removed, or None stands in its place
            return True


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

    A buffer of a dtype that weight files do not hold is left out. The bytes of each TensorInfo are [0, nbytes).
    """
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in saved_weights(model).items():
        dtype = torch_names().get(tensor.dtype)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if dtype is None and not is_parameter:
            continue
        check_memory(torch, tensor, f"{role}: {name}", IN_MEMORY)
        if is_parameter:
            check_weight(tensor, name, role)
        tensors[name] = TensorInfo(name, str(dtype), tuple(tensor.shape), 0, tensor.nbytes)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UsageError(
            f"{role}: parameters must be on one device, got {', '.join(sorted(map(str, devices))) or 'none'}"
        )
    config: Any = getattr(model, "config", None)
    return ModelInMemory(role, tensors, config.to_dict() if hasattr(config, "to_dict") else {})


def check_weight(tensor: torch.Tensor, name: str, role: str) -> None:
    """Raise UsageError if the kernels cannot read and write the tensor in place."""
    what = "parameters" if isinstance(tensor, torch.nn.Parameter) else "buffers that files hold"
    is_known = torch_names().get(tensor.dtype) in ITEMSIZE
    if not is_known or not tensor.is_contiguous() or tensor.layout != torch.strided or tensor.is_neg():
        raise UsageError(f"{role}: {name} is {tensor.dtype}: {what} must be contiguous bf16, fp16, fp32 or fp64")
