"""Find the quantised tensors whose values can be computed: FP8 with scales of any blocks, and the MXFP4 of GPT-OSS.

    fp8                  weight F8_E4M3, weight_scale_inv for blocks of 128 x 128 (DeepSeek V3 and others)
    compressed-tensors   weight F8_E4M3, weight_scale for a tensor, for each row, or for blocks
    fbgemm_fp8           weight F8_E4M3, weight_scale for each row, or for each column of fused experts
    mxfp4                proj_blocks U8 of shape [experts, rows, columns / 32, 16], and proj_scales U8, powers of two

The value of an element is fp32(element) * scale in all of them. Sources: transformers' integrations of these formats,
the repository vllm-project/compressed-tensors, and the OCP Microscaling Formats specification, version 1.0, for MXFP4,
whose first element of a byte is in the low four bits. transformers transposes the experts of GPT-OSS after it has
computed their values, and so does this module: `gate_up_proj` has the shape [experts, columns, rows].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from .safetensors_header import TensorInfo, describe, element_count

BLOCK = 128, 128  # of DeepSeek's FP8, if the config states no other block
MX_COLUMNS = 32  # elements of MXFP4 that share a scale
MX_BYTES = 16  # the bytes of these elements
SCALE_DTYPES = {"F32", "BF16", "F16", "F8_E8M0"}
# Companions of quantised layers that belong to activations and caches: a model in bf16 has no use for them.
ACTIVATIONS = re.compile(r"\.(input|activation|output|[qkv]|kv)_scale(_ub)?$")
SHOWN = 5  # problems of tensors that one message names


class QuantizedTensor(NamedTuple):
    """A quantised tensor.

    Attributes:
        codes: The tensor of the elements.
        scales: The tensor of the scales.
        dtype: F8_E4M3, or F4 for MXFP4.
        shape: The shape of the values.
        block: The rows and the columns of the last two dimensions of `codes` that share a scale.
    """

    codes: TensorInfo
    scales: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    def __str__(self) -> str:
        if self.dtype == "F4":
            return "MXFP4"
        rows, columns = self.shape[-2:]
        if self.block == (rows, columns):
            return "FP8 with a scale for each matrix"
        if self.block == (1, columns):
            return "FP8 with a scale for each row"
        if self.block == (rows, 1):
            return "FP8 with a scale for each column"
        return f"FP8 with scales for blocks of {self.block[0]} x {self.block[1]}"


class QuantizedTensors(NamedTuple):
    """The quantised tensors of a model.

    Attributes:
        found: The tensors whose values can be computed, by the name of the values.
        companions: The names of the tensors that belong to them, and of scales of activations.
        problems: The reasons why others cannot be computed.
    """

    found: dict[str, QuantizedTensor]
    companions: set[str]
    problems: list[str]


def find_quantized(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> QuantizedTensors:
    """Return the quantised tensors among these.

    Args:
        tensors: The tensors of the model by name.
        config: The object of config.json, which may state the size of blocks and the model's type.
    """
    result = QuantizedTensors({}, set(), [])
    stated = _stated_block(config)
    for name, tensor in tensors.items():
        made: QuantizedTensor | str | None = None
        if tensor.dtype == "F8_E4M3":
            made, own_name = _fp8(tensor, tensors, stated), name
        elif name.endswith("_blocks") and tensor.dtype == "U8":
            made, own_name = _mxfp4(tensor, tensors, config), name.removesuffix("_blocks")
        if isinstance(made, QuantizedTensor):
            result.found[own_name] = made
            result.companions.update((name, made.scales.name))
        elif made is not None:
            result.problems.append(made)
    if result.found:
        scalars = {name for name, tensor in tensors.items() if element_count(tensor.shape) == 1}
        result.companions.update(filter(ACTIVATIONS.search, scalars))
    return result


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a block that the config states, or those of DeepSeek's."""
    stated: Any = config.get("quantization_config")
    blocks = [stated.get("weight_block_size")] if isinstance(stated, dict) else []
    groups = stated.get("config_groups") if isinstance(stated, dict) else None
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        blocks.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for block in blocks:
        if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
            return block[0], block[1]
    return BLOCK


def _fp8(codes: TensorInfo, tensors: Mapping[str, TensorInfo], stated: tuple[int, int]) -> QuantizedTensor | str:
    """Return an FP8 tensor with its scales, or the reason why it has none that can be used."""
    found = [tensors[name] for name in (f"{codes.name}_scale_inv", f"{codes.name}_scale") if name in tensors]
    if len(found) != 1:
        return f"{codes.name} is F8_E4M3 and has {'two tensors' if found else 'no tensor'} of scales"
    (scales,) = found
    if f"{codes.name}_zero_point" in tensors:
        return f"{codes.name} is F8_E4M3 and has zero points"
    block = _block(codes.shape, scales.shape, stated)
    if block is None or scales.dtype not in SCALE_DTYPES:
        return f"{codes.name} is {describe(codes)} and its scales are {describe(scales)}"
    return QuantizedTensor(codes, scales, codes.dtype, codes.shape, block)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, int]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if the shape of the scales does not fit."""
    if len(shape) < 2 or 0 in shape:
        return None
    *outer, rows, columns = shape
    lead = tuple(outer)
    if scales in (lead, (*lead, 1, 1)) or (prod(scales) == 1 and prod(lead) == 1):
        return rows, columns
    for block in ((1, columns), (rows, 1), stated, BLOCK):
        if scales == (*lead, -(-rows // block[0]), -(-columns // block[1])):
            return block
    return (1, columns) if scales == (*lead, rows) else None


def _mxfp4(blocks: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> QuantizedTensor | str:
    """Return an MXFP4 tensor of GPT-OSS with its scales, or the reason why it cannot be computed."""
    scales = tensors.get(f"{blocks.name.removesuffix('_blocks')}_scales")
    model = config.get("model_type", "gpt_oss")
    if model != "gpt_oss":
        return (
            f"{blocks.name} looks like MXFP4, of which only the layout of GPT-OSS is known, and the model is {model!r}"
        )
    fits = scales is not None and scales.dtype == "U8" and blocks.shape == (*scales.shape, MX_BYTES)
    if scales is None or not fits or len(scales.shape) < 2 or 0 in scales.shape:
        given = describe(scales) if scales else "not there"
        return f"{blocks.name} is {describe(blocks)} and its scales are {given}"
    *lead, rows, groups = scales.shape
    return QuantizedTensor(blocks, scales, "F4", (*lead, groups * MX_COLUMNS, rows), (1, MX_COLUMNS))
