"""Pairs of checkpoints to merge: a Llama's names, shapes and config, with random weights or as sparse files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from expo.checkpoints.safetensors_header import emit

Shapes = dict[str, tuple[int, ...]]
HEAD = 16  # width of an attention head, so that any size of model has a whole number of them
PIECE = 1 << 24  # elements drawn at a time


def llama_shapes(hidden: int, inner: int, vocabulary: int, layers: int, keys: int | None = None) -> Shapes:
    """Tensor names and shapes of a Llama; keys: width of the key and value projections, hidden without grouping."""
    keys = keys or hidden
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def scaled_llama(elements: float) -> Shapes:
    """A Llama-2-7B made narrower or wider: all of its 291 tensors, of `elements` together at most."""
    scale = (elements / 6.74e9) ** 0.5
    hidden, inner, vocabulary = (max(HEAD, int(size * scale) // HEAD * HEAD) for size in (4096, 11008, 32000))
    return llama_shapes(hidden, inner, vocabulary, layers=32)


def nbytes(shapes: Shapes) -> int:
    """Of one checkpoint's tensors, in bf16."""
    return 2 * sum(prod(shape) for shape in shapes.values())


def write_pair(folder: Path, shapes: Shapes, shards: int, sparse: bool = False) -> Path:
    """folder/sft and folder/aligned in bf16, loadable by transformers: random weights, or files that read as zeros."""
    rng = np.random.default_rng(0)
    names, weight_map = list(shapes), {}
    for role in ("sft", "aligned"):
        (folder / role).mkdir(parents=True)
    for k in range(shards):
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        header, placed = emit([(name, "BF16", shapes[name]) for name in part], {"format": "pt"})
        size = max(tensor.stop for tensor in placed.values())
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        with open(folder / "sft" / file, "wb") as sft, open(folder / "aligned" / file, "wb") as aligned:
            for out in (sft, aligned):
                out.write(header)
                out.truncate(size)
            for left in () if sparse else range(sum(prod(shapes[name]) for name in part), 0, -PIECE):
                weak, strong = _weights(rng, min(left, PIECE))
                sft.write(weak)
                aligned.write(strong)
    for role in ("sft", "aligned"):
        index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": weight_map}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / role / "config.json").write_text(json.dumps(_config(shapes)))
    return folder


def _weights(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    """n elements of sft and aligned as bits of bf16: 2^-11 to 2^-3 of either sign, up to 24% apart.

    That is further than training moves weights, so that a merge differs from aligned by more than rivals' roundings.
    """
    bits = np.frombuffer(rng.bytes(2 * n), np.uint16)
    aligned = (bits & 0x83FF) + 0x3A00
    sft = aligned ^ (np.frombuffer(rng.bytes(n), np.uint8) & 31)
    return sft, aligned


def _config(shapes: Shapes) -> dict[str, Any]:
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // HEAD,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
