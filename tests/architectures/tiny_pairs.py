"""Tiny pairs of checkpoints of any model type: made with seeds, saved, loaded, and compared bit for bit."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_configs import tiny_config
from transformers.models.auto import modeling_auto

ALPHA = 0.3
MOST_PARAMETERS = 12_000_000
SHOWN = 4  # tensors that a message names
State = Mapping[str, torch.Tensor]
# transformers' table of model types, and the class that loads their models.
_KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "vision-language": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
}
# Buffers that a model computes from its config.
_COMPUTED = re.compile(r"(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|attn\.bias|attention\.bias)$")


def model_types(kind: str) -> list[str]:
    """Return all model types of a kind, in alphabetical order."""
    return sorted(getattr(modeling_auto, _KINDS[kind][0]))


def auto_class(kind: str) -> Any:
    """Return the class of transformers that loads models of a kind."""
    return getattr(transformers, _KINDS[kind][1])


@dataclass
class Pair:
    """Two saved models of one model type, and their state dicts.

    Attributes:
        auto: The class that loads the folders.
        folder: The folder for everything.
        sft_state: The whole state dict of sft, as in memory.
        aligned_state: The whole state dict of aligned.
    """

    auto: Any
    folder: Path
    sft_state: State
    aligned_state: State

    @property
    def sft(self) -> Path:
        return self.folder / "sft"

    @property
    def aligned(self) -> Path:
        return self.folder / "aligned"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def save_state(self, role: str, state: State) -> Path:
        """Save a whole state dict as FSDP, accelerate and zero_to_fp32 leave it, beside the files of the model."""
        folder = self.folder / f"state-{role}"
        shutil.copytree(self.folder / role, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        torch.save(dict(state), folder / "pytorch_model.bin")
        return folder


def make_pair(kind: str, model_type: str, folder: Path) -> Pair:
    """Make and save a tiny model of this model type twice: as sft in several shards, and trained a little.

    Raises:
        ValueError: The model cannot be made small.
    """
    auto, config = auto_class(kind), tiny_config(model_type)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the smallest config has {count} parameters")
    torch.manual_seed(1)
    model = auto.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in _floating(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder / "sft", max_shard_size="200KB")
    sft_state = _copied(model.state_dict())
    with torch.no_grad():
        for tensor in _trained(model):
            tensor.add_((torch.randn(tensor.shape) * 0.003).to(tensor.dtype))
    model.save_pretrained(folder / "aligned")
    # A model type may share its config with another one, whose class the automatic choice would take.
    loads = auto if type(model.config) in auto._model_mapping else type(model)
    return Pair(loads, folder, sft_state, _copied(model.state_dict()))


def _floating(tensors: Any) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors if tensor.is_floating_point())


def _trained(model: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters, and the buffers in the state dict that no config decides, each once.

    Parameters that the model computes, and that it does not save, are not trained.
    """
    done: set[int] = set()
    own = dict(model.named_parameters(remove_duplicate=False))
    computed = set(model._keys_to_ignore_on_save or ())
    for name, tensor in model.state_dict().items():
        is_table = (name not in own and _COMPUTED.search(name)) or name in computed
        if tensor.is_floating_point() and not is_table and tensor.data_ptr() not in done:
            done.add(tensor.data_ptr())
            yield tensor


def _copied(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def load(auto: Any, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """Return the model of a folder, and what transformers reports about weights that do not fit."""
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), {key: sorted(map(str, found)) for key, found in info.items() if found}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's weight files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def ties(model: Any) -> list[list[str]]:
    """Return the groups of names that mean one tensor of a model."""
    groups = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups[tensor.data_ptr(), tensor.shape].append(name)
    return sorted(sorted(names) for (address, _), names in groups.items() if len(names) > 1 and address)


def formula(aligned: torch.Tensor, sft: torch.Tensor) -> torch.Tensor:
    """Return aligned + ALPHA * (aligned - sft) with each operation in fp32, rounded once to aligned's dtype."""
    if not aligned.is_floating_point():
        return aligned
    wide = torch.float64 if torch.float64 in (aligned.dtype, sft.dtype) else torch.float32
    alpha = torch.tensor(ALPHA, dtype=torch.float32).to(wide)
    return (aligned.to(wide) + alpha * (aligned.to(wide) - sft.to(wide))).to(aligned.dtype)


def check_same(found: State, expected: State, rounded: bool = False) -> list[str]:
    """Return a message for each tensor that differs in name, dtype, shape or bits.

    Args:
        found: The tensors that are checked. They may lack all names but one of a tied tensor.
        expected: The tensors that they must be.
        rounded: True if a tensor in fp32 may be the expected one rounded to bf16, or the reverse: a model may keep a
            tensor in fp32 that its files have in bf16.
    """
    wrong = [f"{name} is too many" for name in found if name not in expected]
    values = {tensor.data_ptr() for name, tensor in expected.items() if name in found}
    for name, tensor in expected.items():
        if name not in found:
            wrong += [] if tensor.data_ptr() in values or _is_repeated(tensor, expected, found) else [f"no {name}"]
        elif not (_same_bits(found[name], tensor) or (rounded and _same_rounded(found[name], tensor))):
            wrong.append(f"{name} ({tensor.dtype} {list(tensor.shape)}) has other bits")
    return wrong[:SHOWN] + ([f"{len(wrong)} tensors in all"] if len(wrong) > SHOWN else [])


def _is_repeated(tensor: torch.Tensor, expected: State, found: State) -> bool:
    """Return True if an expected tensor of another name, which was found, has the same bits."""
    return any(name in found and _same_bits(other, tensor) for name, other in expected.items() if other is not tensor)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, with those of NaN all alike."""
    return torch.where(tensor.isnan(), torch.zeros_like(tensor), tensor).contiguous().view(-1).view(torch.uint8)


def _same_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != torch.float32 or one.shape != other.shape or other.dtype != torch.float32:
        return False
    return torch.equal(one.to(torch.bfloat16), other.to(torch.bfloat16))
