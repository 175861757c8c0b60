"""The tensors of sft for a live model: those of another model, or those of files.

Files may have other names and layouts than the model in memory. The tables of names and of layouts give most models
their files' tensors as they are in memory. For the others, the model's own class loads the files as a model.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.transposed import transposed_like
from ..dtypes import ITEMSIZE, torch_dtypes
from ..errors import PlanError
from ..inputs.resolve import StrPath, open_one
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..planning.steps import NOT_IN_SFT, ONLY_IN_SFT
from .adapted_files import with_merged_adapters
from .distributed_tensors import fsdp_modules, local_part, reshard
from .fused_files import fuse_like
from .model_weights import ModelInMemory, model_tensors, saved_weights, without_value_head
from .originals import ReadTensor, read_from_tensors


class SftTensors(NamedTuple):
    """The tensors of sft, matched with those of a model.

    Attributes:
        matched: The steps of the model's tensors.
        weights: The weights of sft by name, which may be DTensors; None if they are in files.
        local: This process's part of each of them; {} if they are in files.
        read: Reads bytes of sft's tensors.
    """

    matched: Matched
    weights: dict[str, torch.Tensor] | None
    local: dict[str, torch.Tensor]
    read: ReadTensor


def open_sft(
    stack: ExitStack,
    sft: torch.nn.Module | StrPath,
    model: torch.nn.Module,
    aligned: ModelInMemory,
    options: MergeOptions,
    base: StrPath | None,
) -> SftTensors:
    """Return the tensors of sft for a model.

    Args:
        stack: It closes files at its end.
        sft: Another model, or a folder, a file or a hub id.
        model: The model with the aligned weights.
        aligned: The tensors of that model.
        options: The options of the matching.
        base: The checkpoint under sft, if that is an adapter; else None.

    Raises:
        CheckpointError: The files cannot be read.
        PlanError: The two models cannot be merged.
    """
    if isinstance(sft, torch.nn.Module):
        found = _of_model(sft, aligned, options)
        found.matched.check()
        return found
    checkpoint = stack.enter_context(open_one(sft, base=base))
    plain = transposed_like(without_value_head(checkpoint, aligned), aligned)
    other, read = fuse_like(*with_merged_adapters(plain), aligned)
    matched = match_tensors(other, aligned, options)
    if not matched.problems:
        return SftTensors(matched, None, {}, read)
    loaded = _load_like(model, checkpoint) if _has_other_names(matched) else None
    if loaded is not None:
        found = _of_model(loaded, aligned, options)
        if not found.matched.problems:
            warnings.warn(
                f"the tensors of {checkpoint.path} have other forms in memory than in its files, so transformers has "
                "loaded it as a model too, on the CPU",
                stacklevel=4,
            )
            return found
    _refuse(matched)
    raise AssertionError("there is a problem")


def _of_model(sft: torch.nn.Module, aligned: ModelInMemory, options: MergeOptions) -> SftTensors:
    """Return the tensors of another model."""
    reshard(fsdp_modules(sft))
    matched = match_tensors(model_tensors(sft, "sft"), aligned, options)
    weights = saved_weights(sft)
    local = {name: local_part(tensor.detach()) for name, tensor in weights.items()}
    return SftTensors(matched, weights, local, read_from_tensors(local))


def _has_other_names(matched: Matched) -> bool:
    """Return True if both sides have tensors without a counterpart."""
    only_in_sft = any(reason == ONLY_IN_SFT for reason in matched.dropped.values())
    return only_in_sft and any(step.reason == NOT_IN_SFT for step in matched.steps)


def _load_like(model: torch.nn.Module, checkpoint: Checkpoint) -> torch.nn.Module | None:
    """Return the model that a model's own class loads from a folder, on the CPU; None if it does not load it whole.

    The weights have the dtype of the files, or fp32, which is exact, if the files have several.
    """
    transformers: Any = sys.modules.get("transformers")
    is_computed = checkpoint.dequantized or checkpoint.in_parts or checkpoint.adapters
    is_loadable = checkpoint.folder is not None and not is_computed
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or not is_loadable:
        return None
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in ITEMSIZE}
    dtype = torch_dtypes()[dtypes.pop() if len(dtypes) == 1 else "F32"]
    if "F64" in dtypes:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = type(model.config).from_pretrained(checkpoint.path)  # several model types may share a class
            loaded, info = type(model).from_pretrained(
                checkpoint.path, config=config, dtype=dtype, output_loading_info=True
            )
    except Exception:  # any error of a library that loads models: the plan's problems say what differs
        return None
    whole: torch.nn.Module = loaded
    return None if info["missing_keys"] else whole


def _refuse(matched: Matched) -> None:
    """Raise PlanError with every problem, and with advice if the model's names are not those of sft's files."""
    if _has_other_names(matched):
        raise PlanError(
            "the names of the model's tensors are not those of sft's files; if the library that loads a model changes "
            "names, as transformers does when it fuses experts, load sft with the same library and give that model "
            "instead of the files\n" + "\n".join(matched.problems)
        )
    matched.check()
