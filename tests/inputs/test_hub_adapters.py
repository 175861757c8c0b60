"""Two adapters and their base by hub ids: the plans, and what the configs say about the adapters' place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checkpoint_files import random_tensors, safetensors_bytes
from hub_client import Client
from hub_server import Hub

BASE = {"model.layers.0.self_attn.q_proj.weight": ("BF16", (16, 16)), "model.norm.weight": ("BF16", (16,))}
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter(base: str, rank: int) -> dict[str, bytes]:
    """Return the files of an adapter whose config names this base."""
    shapes = {FACTOR.format("A"): ("F32", (rank, 16)), FACTOR.format("B"): ("F32", (16, rank))}
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": base}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors_bytes(random_tensors(shapes, rank)),
    }


@pytest.fixture
def repositories(server: Hub) -> None:
    files = {"model.safetensors": safetensors_bytes(random_tensors(BASE, 1)), "config.json": b'{"model_type": "llama"}'}
    server.add("org/base", files)
    server.add("org/sft", adapter("org/base", 2))
    server.add("org/dpo", adapter("org/base", 3))
    server.add("org/stacked", adapter("org/sft", 3))


@pytest.mark.usefixtures("repositories")
def test_plans_by_hub_ids(client: Client) -> None:
    refused, over_base, over_sft = client.plan(
        ("org/sft", "org/dpo"),
        ("org/sft", "org/dpo", "--base", "org/base"),
        ("org/sft@main", "org/stacked", "--base", "org/base@main"),
    )
    assert "its config names 'org/base', so add --base org/base" in refused
    assert over_base["base"] == (
        "base org/base: aligned's adapter was trained on the base, because its config names 'org/base', as sft's does"
    )
    assert over_sft["base"] == (
        "base org/base@main: aligned's adapter was trained on the model that sft's adapter makes of the base, because "
        "its config names 'org/sft', which is sft's adapter"
    )
    for plan in (over_base, over_sft):
        reasons = {step["name"]: step["reason"] for step in plan["steps"]}
        assert reasons["model.layers.0.self_attn.q_proj.weight"] == (
            "sft's adapter of rank 2 and aligned's adapter of rank 3"
        )
        assert plan["problems"] == []
