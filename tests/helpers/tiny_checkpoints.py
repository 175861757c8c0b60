"""Tiny random checkpoints that transformers loads, of architectures whose names in memory and in files may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo.demo import ALIGNED
from expo.tensors.model_weights import saved_weights

Weights = dict[str, torch.Tensor]


def make_llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a dense model, whose names are the same in memory and in files."""
    make: Any = transformers.LlamaConfig
    config = make(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_qwen(dtype: torch.dtype = torch.bfloat16, vocabulary: int = 1536, tied: bool = False) -> Any:
    """Return a mixture, whose experts transformers fuses in memory."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_deepseek() -> Any:
    """Return a mixture with a router that is fp32 in memory whatever its files have, and with a bias as a buffer."""
    config = transformers.DeepseekV3Config(
        vocab_size=1536, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=4, n_shared_experts=1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def save_random(folder: Path, model: Any, seed: int, edit: Callable[[Weights], None] | None = None) -> Path:
    """Randomise every weight of a model, save it with the demo's tokenizer, and let `edit` change the saved weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in saved_weights(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(folder)
    if edit is not None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    """Return the model of a folder in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
