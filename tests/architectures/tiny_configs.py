"""Tiny configs of model types: transformers' own defaults with every size made small.

A config is shrunk by the names of its fields. `OVERRIDES` has the fields that depend on each other and the defaults
that are None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import transformers

LAYERS = 4  # so many layers have one of each kind in most hybrid models

# The first expression that is found in a field's name decides about the field's value.
_SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"vocab_size|^n_vocab$|^n_tokens$|^codebook_size$", 160),
        (r"^pad_(token_id|index|idx)$", 0),
        (r"experts?_per_|^moe_(topk|top_k|k)$|num_selected_experts|^top_k_experts|router_topk", 2),
        (r"^(n_group|num_expert_groups?|n_groups_moe|topk_group|n_limited_groups)$", 1),
        (r"^(moe_)?(n|num)_shared_experts?$", 1),
        (r"(local|num|routed|n|zero)_experts|zero_expert_num", 4),
        (r"^(first_k_dense_replace|num_dense_layers?|first_dense_layers|moe_layer_start_index)$", 1),
        (r"_layer_period|moe_layer_(freq|interval)|sparse_step|_moe_layer_step|cross_attn_every", 2),
        (r"_layer_offset", 1),
        (r"^qk_(nope|rope)_head_dim$", 8),
        (r"head_dim$|^attention_head_size$|^mamba_d_head$|^d_head$|^d_kv$", 16),
        (r"lora_rank|low_rank_dim|^decay_lora", 16),
        (r"key_value_(heads|groups)|kv_heads|^n_head_kv|multi_query_group_num", 2),
        (r"heads$|n_head$|nhead", 4),
        (r"layers$|^num_blocks?$|depth$|n_layer$", LAYERS),
        (r"intermediate_size|ffn_(dim|hidden)|d_ff|n_inner|mlp_(dim|hidden)|feed_forward|inner_dim|d_inner$", 96),
        (r"hidden_size|d_model|n_embd|hidden_dim|channels_last|num_channels_hidden", 64),
        (r"(embed|embedding|emb|out_hidden|lru)_(size|width)$|dim$|_width$", 64),
        (r"max_position|n_positions|n_ctx|max_(seq|source_pos|target_pos|length)|position_embedding_size", 64),
        (r"^(image|img|input)_size$", 32),
        (r"^(spatial_)?patch_size$", 8),
        (r"d_state|state_size|ssm_state", 8),
        (r"sliding_window|attention_window|window_size|chunk_size|local_attn", 16),
    )
)  # fmt: skip
_ID = re.compile(r"_(token_)?(id|ids|idx|index)$")
_KEPT = re.compile(
    r"channels|temporal_patch|spatial_merge|conv|expand|version|num_labels|kernel|stride|use_|is_|factor|num_mel"
    r"|pretraining_tp|rate|scale|eps|n_future|pipeline"
)
_LAYER_COUNT = re.compile(r"layers$|depth$|n_layer$")
_UNTOUCHED = ("rope_parameters", "rope_scaling", "id2label", "label2id")
_OMITTED = ("transformers_version", "architectures", "_name_or_path", "torch_dtype", "dtype", "model_type")

DROP = object()  # the value of a field that is removed
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_expand": 2}
_GEMMA = {
    "per_layer_config": DROP, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "global_head_dim": 32,
    "num_kv_shared_layers": 0,
}  # fmt: skip
_INDEXER = {
    "indexer_budget": 32, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}  # fmt: skip
_DOTS = {"per_layer_config": DROP, "layer_types": DROP, "mlp_layer_types": DROP, "num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _text(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides for the text model's config inside another config."""
    return {f"text_config.{name}": value for name, value in fields.items()}


# Overrides by model type. A dot in a field's name leads into a nested config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": _text({"rope_parameters": {"full_attention": _ROPE}}),
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cosmos3_edge": _text({"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}),
    "dbrx": {"attn_config.rope_theta": 10000.0, "rope_parameters": _ROPE, "ffn_config.hidden_size": 64},
    "diffusion_gemma": _text(_GEMMA),
    "deepseek_ocr2": _text({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    "dory": {
        "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2, "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp"] * 3 + ["full_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": _text(_DOTS),
    "dots3_note_text": _DOTS,
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "esm": {"vocab_size": 33},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "intermediate_size": [96] * LAYERS, "layer_types": _GEMMA["layer_types"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4": _text(_GEMMA),
    "gemma4_assistant": _text({**_GEMMA, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
    "gemma4_text": _GEMMA,
    "gemma4_unified": _text(_GEMMA),
    "gemma4_unified_assistant": _text({**_GEMMA, "hidden_size_per_layer_input": 0}),
    "gemma4_unified_text": _GEMMA,
    "glm5_next": _text({"num_key_value_heads": 4}),
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "4/8"},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": _text({"head_dim": 16}),
    "hy_v4_vl": _text({"qk_rope_head_dim": 64}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16, "num_key_value_heads": 2},
    "mobilebert": {"embedding_size": 32},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2]},
    "moshi": {"audio_encoder_config.codebook_size": 64, "audio_vocab_size": 64},
    "neomme": {"per_layer_config": DROP},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen4_exp": _text(_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "zamba": {"layers_block_type": DROP, "num_hidden_layers": 8, "attn_layer_period": 3, "attn_layer_offset": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Return a config of this model type whose model has less than some millions of parameters."""
    kind: Any = transformers.CONFIG_MAPPING[model_type]
    fields = _shrunk(kind().to_dict())
    for name, value in OVERRIDES.get(model_type, {}).items():
        *outer, last = name.split(".")
        place = fields
        for part in outer:
            place = place.setdefault(part, {})
        if value is DROP:
            place.pop(last, None)
        else:
            place[last] = value
    return kind(**fields)


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config with every size small, those of nested configs too."""
    counts = {value for name, value in config.items() if type(value) is int and _LAYER_COUNT.search(name)}
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _OMITTED:
            continue
        if type(value) is int:
            fields[name] = _small(name, value)
        elif isinstance(value, dict) and name not in _UNTOUCHED and all(isinstance(key, str) for key in value):
            fields[name] = _shrunk(value) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif isinstance(value, list):
            fields[name] = _small_list(name, value, counts)
        else:
            fields[name] = value
    return fields


def _small(name: str, value: int) -> int:
    """Return a small value of a field that has an integer; one that is small already stays."""
    for pattern, size in _SIZES:
        if pattern.search(name):
            return min(value, size) if name != "vocab_size" else size
    if _ID.search(name):  # a token's id must be below the vocabulary's size
        return value if -1 <= value < 100 else 3 + sum(map(ord, name)) % 90
    return 64 if value >= 1024 and not _KEPT.search(name) else value


def _small_list(name: str, values: list[Any], counts: set[int]) -> list[Any]:
    """Return a list with an entry for each layer cut to LAYERS entries, and with small numbers in other lists."""
    if len(values) in counts and len(values) > LAYERS:
        kinds = [json.loads(text) for text in dict.fromkeys(map(json.dumps, values))][:LAYERS]
        return kinds + values[::-1][: LAYERS - len(kinds)]
    if _ID.search(name):
        return [_small(name, value) if type(value) is int else value for value in values]
    if values and all(type(value) is int for value in values) and re.search(r"layers|index|indices", name):
        return sorted({min(value, LAYERS - 1) for value in values})
    return values
