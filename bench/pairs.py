"""Write pairs of checkpoints: the names, shapes and config of a Llama, with random weights or as sparse files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from expo.checkpoints.safetensors_header import emit

Shapes = dict[str, tuple[int, ...]]
HEAD_WIDTH = 16  # an attention head is this narrow, so that a model of any size has a whole number of heads
DRAWN_ELEMENTS = 1 << 24  # so many elements are drawn at a time


def llama_shapes(hidden: int, inner: int, vocabulary: int, layers: int, keys: int | None = None) -> Shapes:
    """Return the names and shapes of a Llama's tensors.

    Args:
        hidden: The width of the hidden state.
        inner: The width of the feed-forward part.
        vocabulary: The number of tokens.
        layers: The number of layers.
        keys: The width of the key and value projections; `hidden` if they are not grouped.
    """
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
    """Return the 291 tensors of Llama-2-7B, made narrower or wider to have about, and at most, `elements` elements."""
    scale = (elements / 6.74e9) ** 0.5
    heads = (max(1, int(size * scale) // HEAD_WIDTH) for size in (4096, 11008, 32000))
    hidden, inner, vocabulary = (HEAD_WIDTH * count for count in heads)
    return llama_shapes(hidden, inner, vocabulary, layers=32)


def nbytes(shapes: Shapes) -> int:
    """Return the bytes of one checkpoint's tensors in bf16."""
    return 2 * sum(prod(shape) for shape in shapes.values())


def write_pair(folder: Path, shapes: Shapes, shards: int, sparse: bool = False) -> Path:
    """Write folder/sft and folder/aligned in bf16, as transformers loads them; the bytes of sparse files are zeros."""
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
            for left in () if sparse else range(sum(prod(shapes[name]) for name in part), 0, -DRAWN_ELEMENTS):
                sft_bits, aligned_bits = _draw_weights(rng, min(left, DRAWN_ELEMENTS))
                sft.write(sft_bits)
                aligned.write(aligned_bits)
    for role in ("sft", "aligned"):
        index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": weight_map}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / role / "config.json").write_text(json.dumps(_config(shapes)))
    return folder


def _draw_weights(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    """Return n elements of sft and of aligned as bits of bf16, from 2^-11 to 2^-3 in size and up to 24% apart.

    Training moves weights by less. With this distance, a merge differs from aligned by more than the rivals' roundings.
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
        "num_attention_heads": hidden // HEAD_WIDTH,
        "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // HEAD_WIDTH,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
