"""Quantised checkpoints: which scheme, by config, file or tensor names, and the way out. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint
from .header import TensorInfo
from .kernels.contract import ITEMSIZE

ORIGINAL = "use the checkpoint that it was quantised from"
LOADED = "load it with transformers, quantization_config={0}(dequantize=True), and save_pretrained() it"
WAYS_OUT = {
    "fp8": f"{ORIGINAL}, or {LOADED.format('FineGrainedFP8Config')}",
    "mxfp4": f"{ORIGINAL}, or {LOADED.format('Mxfp4Config')}",
    "bitsandbytes": f"{ORIGINAL}, or load it with transformers, model.dequantize() and save_pretrained() it",
}
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Companions of a weight that is stored as codes, by scheme.
TENSORS = (
    (re.compile(r"\.weight_scale_inv$"), "fp8"),
    (re.compile(r"\.weight_(packed|scale)$"), "compressed-tensors"),
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.qzeros$"), "gptq or awq"),
    (re.compile(r"\.weight\.(absmax|quant_state\.\w+|quant_map|nested_absmax)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"_blocks$"), "mxfp4"),
)
SCALE = re.compile(r"\.weight_scale(_inv)?$")


def scheme(checkpoint: Checkpoint) -> str | None:
    """The name of the quantisation scheme, None for a checkpoint of plain numbers."""
    config: Any = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if config:
        return str((config.get("quant_method") or "unknown") if isinstance(config, dict) else config)
    for name, found in FILES.items():
        if name in checkpoint.files:
            return found
    tensors = checkpoint.tensors
    for pattern, found in TENSORS:
        if any(pattern.search(name) and _is_companion(name, tensors) for name in tensors):
            return found
    return None


def _is_companion(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor of such a name comes with codes: a scale beside a weight of plain numbers is a weight itself."""
    if name.endswith("_blocks"):
        return tensors[name].dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in tensors
    weight = tensors.get(SCALE.sub(".weight", name)) if SCALE.search(name) else None
    return weight is None or weight.dtype not in ITEMSIZE


def problem(role: str, checkpoint: Checkpoint) -> str | None:
    """Why a quantised checkpoint cannot be extrapolated, and the way out; None where it is not quantised."""
    found = scheme(checkpoint)
    if found is None:
        return None
    return (
        f"{role} {checkpoint.path} is quantised (quant_method {found}): its numbers are codes that cannot be "
        f"extrapolated; {WAYS_OUT.get(found, ORIGINAL)}"
    )
