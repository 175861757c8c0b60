"""The parts of a model that need rules of their own: head, embeddings, and buffers, by the names of their tensors.

Two settings of config.json belong to them: the tie of the head to the embedding, and the kind of head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .safetensors_header import TensorInfo

# Old files carry buffers beside the weights: tables and masks that the model computes from its config.
BUFFERS = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)|(cross)?(attn|attention)\.masked_bias"
    r"|embeddings\.position_ids|freqs_cis)$"
)
MASK = re.compile(r"(^|\.)(cross)?(attn|attention)\.bias$")  # GPT-2's, GPT-NeoX's: [1, 1, n, n], where a bias has [n]

# Heads and embeddings have a row for each token. None is part of a numbered layer, where other tensors have such names.
_OUTSIDE_LAYERS = r"^(?!(.*\.)?\d+\.)"
_WRAPPERS = r"((module|_orig_mod|base_model|model|transformer|language_model)\.)*"
HEAD = re.compile(rf"{_OUTSIDE_LAYERS}((.*\.)?(lm_head|embed_out)|{_WRAPPERS}output)\.weight$")
EMBEDDING = re.compile(
    rf"{_OUTSIDE_LAYERS}((.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|backbone\.embeddings?)"
    rf"|{_WRAPPERS}shared)\.weight$"
)
# Encoder and decoder of T5 and BART share one embedding, which has one of these names.
SHARED = re.compile(rf"{_OUTSIDE_LAYERS}{_WRAPPERS}(shared|(encoder|decoder)\.embed_tokens)\.weight$")

# TRL's models have a head for the value of a state, which is no part of the language model.
VALUE_HEAD = re.compile(r"^v_head\.")

_GENERATES = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForImageTextToText|ForMaskedLM|ForSeq2SeqLM")

# The model type of a language model alone, for the types of vision-language models whose text_config has a type of its
# own, or that have no text_config in old files.
_LANGUAGE_MODELS = {
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe",
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip

# A message says this of a weight that has no elements.
EMPTY_HINT = "DeepSpeed ZeRO-3 and FSDP leave empty ones unless the weights are gathered before saving"


def is_embedding(name: str) -> bool:
    """Return True for the name of a tensor with a row for each token: an embedding or a head."""
    return bool(HEAD.search(name) or EMBEDDING.search(name))


_SINUSOIDS = re.compile(r"(model\.)?(en|de)coder\.embed_positions\.weight")


def is_buffer(tensor: TensorInfo) -> bool:
    """Return True for a table or mask that the model computes from its config, and that is no weight."""
    if MASK.search(tensor.name):
        return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return BUFFERS.search(tensor.name) is not None


def is_computed(config: Mapping[str, Any], name: str) -> bool:
    """Return True for the sinusoids that Marian computes: a state dict has them, and save_pretrained omits them."""
    return config.get("model_type") == "marian" and _SINUSOIDS.fullmatch(name) is not None


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Return tie_word_embeddings of a config, or of its text_config if the config itself says nothing.

    In a model that was put together of an encoder and a decoder, the decoder's setting counts for its own head. The
    result is None if no config has the setting, so that the tensors in the files decide. The outer setting counts
    because transformers reads the one of the config that belongs to the whole model.
    """
    inner, decoder, named = config.get("text_config"), config.get("decoder"), config.get("architectures")
    is_pair = isinstance(named, list) and any(str(name).endswith("EncoderDecoderModel") for name in named)
    if is_pair and isinstance(decoder, dict):
        config = decoder
    said = (each.get("tie_word_embeddings") for each in (config, inner if isinstance(inner, dict) else {}))
    return next((flag for flag in said if isinstance(flag, bool)), None)


def language_model_type(config: Mapping[str, Any]) -> str | None:
    """Return the model type of the language model in a model: its own type, or the one of its text_config.

    A vision-language model and the text model that it was made from have the same one. The result is None if the config
    names no type.
    """
    inner = config.get("text_config")
    found = inner.get("model_type") if isinstance(inner, dict) else None
    name = found if isinstance(found, str) else config.get("model_type")
    return _LANGUAGE_MODELS.get(name, name) if isinstance(name, str) else None


def generates(config: Mapping[str, Any]) -> bool:
    """Return True if a model may have a head that gives scores of tokens.

    The result is False if the config names a classifier, or a model without a head.
    """
    architectures = config.get("architectures") or []
    return not architectures or any(_GENERATES.search(str(each)) for each in architectures)
