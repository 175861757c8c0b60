"""The weights of a model in memory: its parameters and persistent buffers, by the names of its state dict."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_parts import VALUE_HEAD
from ..checkpoints.naming import unwrap
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE, torch_names
from ..errors import UsageError
from .distributed_tensors import is_distributed, local_part
from .memory_checks import check_memory

IN_MEMORY = "a live model has all its weights in memory, so load them first"
MOVED = "the model's weights have moved in memory: move the model before you create Live"
# Parts of the names in a model whose layers PEFT has wrapped.
_PEFT = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_\w+|ia3_\w+|hada_w\w*|oft_\w+|vera_\w+)(\.|$)")
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


class WeightPositions:
    """The places of a model's parameters and of some of its buffers in the model's modules, and their addresses.

    A live model asks before each launch if the addresses have changed. The tensors are read from the modules' own
    dictionaries in loops that run in C: for 291 parameters, `model.parameters()` would take thirty times as long as a
    launch.
    """

    def __init__(self, model: torch.nn.Module, rewritten: Collection[str]) -> None:
        """Remember all parameters, and the buffers among the names of the tensors that will be rewritten."""
        self._dictionaries: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._is_rewritten: list[bool] = []
        self._modules = [module._modules for module in model.modules()]
        self._former_modules = [dict(children) for children in self._modules]
        for prefix, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    is_rewritten = (f"{prefix}.{name}" if prefix else name) in rewritten
                    if tensor is not None and (is_rewritten or tensors is module._parameters):
                        self._dictionaries.append(tensors)
                        self._names.append(name)
                        self._is_rewritten.append(is_rewritten)
        tensors, _ = self.read()
        self._has_parts = any(is_distributed(tensor) for tensor in tensors)
        self._former_addresses = self._addresses(tensors)

    def read(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors in their places now, and those among them that are rewritten.

        Raises:
            UsageError: A tensor or a module was removed or replaced.
        """
        try:
            tensors = list(map(operator.getitem, self._dictionaries, self._names))
        except KeyError as error:
            raise UsageError(MOVED) from error
        if self._modules != self._former_modules:  # modules are equal if they are the same object
            raise UsageError(MOVED)
        return tensors, list(itertools.compress(tensors, self._is_rewritten))

    def changed(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return True if one of the tensors that `read` has returned is at another address than at first."""
        try:
            return self._addresses(tensors) != self._former_addresses
        except (AttributeError, TypeError):  # None stands in the place of a tensor
            return True

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        if self._has_parts:
            return [local_part(tensor).data_ptr() for tensor in tensors]
        return list(map(torch.Tensor.data_ptr, tensors))


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
    adapters: tuple[()] = ()
    notes: tuple[str, ...] = ()
    dequantized: Collection[str] = ()


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
        if _PEFT.search(name):
            raise UsageError(
                f"{role}: {name} belongs to a PEFT adapter, whose effect is not in the weights of the model: set "
                "model = model.merge_and_unload() and give that model"
            )
    if next(model.parameters(), None) is None:
        raise UsageError(f"{role}: the {type(model).__name__} has no parameters, so it is no model")
    return ModelInMemory(role, tensors, _config_of(model))


def _config_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return the config of a model, or of the first model of transformers inside a wrapper, as config.json has it.

    A model that was not loaded from a folder names no class in its config, so its own class is named here.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            fields: dict[str, Any] = config.to_dict()
            return {**fields, "architectures": fields.get("architectures") or [type(module).__name__]}
    return {}


def without_value_head(checkpoint: Checkpoint, model: ModelInMemory) -> Checkpoint:
    """Return sft's checkpoint without TRL's value head, unless the model in memory has one.

    transformers loads such a checkpoint without the value head, which is no part of the language model.
    """
    if any(VALUE_HEAD.search(unwrap(name)) for name in model.tensors):
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not VALUE_HEAD.search(unwrap(name))}
    return replace(checkpoint, tensors=tensors)


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
