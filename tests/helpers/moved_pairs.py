"""Pairs of checkpoints whose aligned tensors are sft's, moved a little, as training moves them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from checkpoint_files import Tensors, random_tensors, write_folder
from torch_files import wide

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def llama_shapes(layers: int, dtype: str = "BF16", width: int = 16) -> Shapes:
    """Return the (dtype, shape) of every tensor of a small Llama."""
    shapes: Shapes = {"model.embed_tokens.weight": (dtype, (40, width)), "lm_head.weight": (dtype, (40, width))}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{module}.weight": (dtype, (width, width)) for module in MODULES}
        shapes |= {
            f"model.layers.{i}.{kind}_layernorm.weight": (dtype, (width,)) for kind in ("input", "post_attention")
        }
    return {**shapes, "model.norm.weight": (dtype, (width,))}


def move(tensors: Tensors, by: float = 1e-3, but: str = "^$") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Add normal noise of size `by` to the BF16 and F32 tensors, except for those whose names match `but`."""
    moved = dict(tensors)
    for k, (name, (dtype, shape, data)) in enumerate(tensors.items()):
        if dtype not in ("BF16", "F32") or re.search(but, name):
            continue
        values = wide(data, dtype)
        bits = (values + np.random.default_rng(k).standard_normal(len(values)) * by).astype("<f4")
        truncated = (bits.view("<u4") >> 16).astype("<u2")
        moved[name] = dtype, shape, (truncated if dtype == "BF16" else bits).tobytes()
    return moved


def write_pair(folder: Path, shapes: Shapes, by: float = 1e-3, but: str = "^$") -> tuple[Path, Path]:
    """Write the folders sft, random, and aligned, which is sft moved; return both."""
    sft = random_tensors(shapes, 1)
    return write_folder(folder / "sft", sft), write_folder(folder / "aligned", move(sft, by, but))
