"""Adapters that are refused: the steps with PEFT that the message names give the trained model, which can be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet
from tiny_models import IDS, LOAD, logits

import expo

peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
BIASED = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True)
FUSED_IN_FILES = transformers.GptOssConfig(
    **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

REFUSED: dict[str, tuple[Any, Any]] = {
    "DoRA": (LLAMA, lambda: peft.LoraConfig(**LORA, use_dora=True)),
    "biases of lora_B": (BIASED, lambda: peft.LoraConfig(**LORA, lora_bias=True)),
    "single tokens": (LLAMA, lambda: peft.LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [3, 4]})),
    "LoHa": (LLAMA, lambda: peft.LoHaConfig(**LORA)),
    "IA3": (LLAMA, lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                                          feedforward_modules=["down_proj"])),
    "experts": (FUSED_IN_FILES, lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)),
}  # fmt: skip


def made(config: Any, folder: Path) -> Any:
    """Save a base, and return the model that is loaded from its folder."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return LOAD(folder, dtype=torch.float32)


def shake(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_peft_has_merged_takes_the_adapters_place(kind: str, tmp_path: Path) -> None:
    config, adapter = REFUSED[kind]
    with quiet(), torch.no_grad():
        wrapped = peft.get_peft_model(made(config, tmp_path / "base"), adapter())
        shake(wrapped)
        wrapped.save_pretrained(tmp_path / "adapter")
        want = wrapped.eval()(IDS).logits
    with pytest.raises(expo.CheckpointError) as caught:
        expo.merge(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out")
    assert (
        "merge it with PEFT's merge_and_unload(), save the result with save_pretrained(), and give that folder instead"
        in str(caught.value)
    )
    with quiet():
        wrapped.merge_and_unload().save_pretrained(tmp_path / "whole")
    expo.merge(tmp_path / "base", tmp_path / "whole", 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-4)
    assert (logits(tmp_path / "base") - want).abs().max() > 1e-3, "the training changed the model"


def test_an_adapter_that_changed_its_base_is_converted_as_the_message_says(tmp_path: Path) -> None:
    with quiet(), torch.no_grad():
        model = made(LLAMA, tmp_path / "base")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights="pissa"))
        wrapped.peft_config["default"].init_lora_weights = True  # PEFT needs this before the training
        wrapped.save_pretrained(tmp_path / "before")
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        shake(wrapped)
        want = wrapped.eval()(IDS).logits
        wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(expo.CheckpointError, match="path_initial_model_for_weight_conversion"):
        expo.merge(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out")
    with quiet():
        wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "before")
    expo.merge(tmp_path / "base", tmp_path / "converted", 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-4)
