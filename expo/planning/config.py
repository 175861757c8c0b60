"""Make an output's config.json: aligned's, with another dtype, vocabulary size or tie where the output needs it.

The entry of a quantisation is not in the config of an opened checkpoint whose values are plain numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import CONFIG
from ..checkpoints.model_parts import is_embedding
from ..dtypes import TABLE
from .steps import Step


def rewrite_config(aligned: Checkpoint, steps: Sequence[Step], dtype: str | None) -> dict[str, bytes]:
    """Return {"config.json": its new bytes}; {} if the output can have aligned's config.json, or aligned has none.

    Args:
        aligned: The checkpoint whose config the output takes over.
        steps: The steps of the output's tensors.
        dtype: The safetensors name of the output's dtype; None if every tensor keeps its dtype in aligned.
    """
    config = aligned.config
    if CONFIG not in aligned.files:
        return {}
    if dtype is not None:
        name = TABLE[dtype].torch
        config = _with_dtype(
            config if {"dtype", "torch_dtype"} & set(config) else {**config, "torch_dtype": None}, name
        )
    if aligned.adapters:
        whole = {name for adapter in aligned.adapters for name in adapter.full}
        names = {step.name for step in steps if is_embedding(step.name)} & whole
        sizes = {aligned.tensors[name].shape[0] for name in names}
        config = _with_vocabulary(config, sizes.pop()) if len(sizes) == 1 else config
        config = _untie(config) if any(adapter.unties for adapter in aligned.adapters) else config
    unchanged = config == aligned.config and not aligned.config_changed
    return {} if unchanged else {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the config with another vocabulary size, at the top level and in its text model's config.

    A level that states no vocabulary size is left as it is.
    """
    inner = config.get("text_config")
    text = {"text_config": _with_vocabulary(inner, size)} if isinstance(inner, dict) else {}
    own = {"vocab_size": size} if "vocab_size" in config else {}
    return {**config, **text, **own}


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the config with this dtype for every dtype, null included, of the config and of its nested configs."""
    return {
        key: name if key in ("dtype", "torch_dtype") and isinstance(value, str | None)
        else _with_dtype(value, name) if isinstance(value, dict) and key.endswith("config")
        else value
        for key, value in config.items()
    }  # fmt: skip


def _untie(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with a statement that the head is not tied to the embedding."""
    inner = config.get("text_config")
    text = {"text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return {**config, **text, "tie_word_embeddings": False}
