"""Merges of a text model and the vision-language model that was made from it, in both directions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet
from safetensors.torch import load_file, save_file

import expo
from expo.checkpoints.auto_class import auto_class

ALPHA = 0.3
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, "patch_size": 14,
}  # fmt: skip
EXPERTS = {
    **TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}  # fmt: skip


def configs(family: str) -> tuple[Any, Any]:
    """Return the configs of a text model and of a vision-language model with the same language model."""
    library: Any = transformers
    if family == "gemma3":
        return library.Gemma3TextConfig(**TEXT), library.Gemma3Config(
            text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4
        )
    if family == "qwen2_5_vl":
        text = {key: value for key, value in TEXT.items() if key != "head_dim"}
        inner = {**text, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}}
        return library.Qwen2Config(**text), library.Qwen2_5_VLConfig(text_config=inner, vision_config=QWEN_VISION)
    if family == "qwen3_vl":
        vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
        return library.Qwen3Config(**TEXT), library.Qwen3VLConfig(text_config=TEXT, vision_config=vision)
    if family == "mistral3":
        return library.MistralConfig(**TEXT), library.Mistral3Config(
            text_config={**TEXT, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral"},
            tie_word_embeddings=False,
        )  # fmt: skip
    if family == "llava":
        return library.LlamaConfig(**TEXT), library.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"}, image_token_index=3,
            vision_config={**VISION, "model_type": "clip_vision_model"},
        )  # fmt: skip
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    vision = {**VISION, **widths, "intermediate_size": 128}
    return library.Llama4TextConfig(**EXPERTS), library.Llama4Config(text_config=EXPERTS, vision_config=vision)


FAMILIES = [
    "gemma3", "qwen2_5_vl",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("qwen3_vl", "mistral3", "llava", "llama4")),
]  # fmt: skip


def make(config: Any, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Save a model with random weights and return the tensors of its file."""
    torch.manual_seed(seed)
    library: Any = transformers
    auto = library.AutoModelForImageTextToText if hasattr(config, "vision_config") else library.AutoModelForCausalLM
    with quiet():
        model = auto.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def language_name(name: str) -> str:
    """Return the name that a tensor of a vision-language model has in the language model alone."""
    return re.sub(r"^(model\.language_model\.|language_model\.model\.)", "model.", name).replace(
        "language_model.lm_head", "lm_head"
    )


def formula(aligned: torch.Tensor, sft: torch.Tensor) -> torch.Tensor:
    alpha = torch.tensor(ALPHA, dtype=torch.float32)
    return (aligned.float() + alpha * (aligned.float() - sft.float())).to(aligned.dtype)


def check_output(out: Path, aligned: dict[str, torch.Tensor], sft: dict[str, torch.Tensor]) -> None:
    """Check that the language model is extrapolated, that the rest is aligned's, and that the named class loads it."""
    by_name = {language_name(name): tensor for name, tensor in sft.items()}
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == aligned.keys()
    shared = [name for name in aligned if language_name(name) in by_name]
    assert len(shared) >= min(len(aligned), len(sft))
    for name, tensor in aligned.items():
        wanted = formula(tensor, by_name[language_name(name)]) if name in shared else tensor
        assert torch.equal(merged[name], wanted), name
    kind = auto_class(json.loads((out / "config.json").read_text()))
    assert f"from transformers import {kind}\n" in (out / "README.md").read_text()
    with quiet():
        _, info = getattr(transformers, kind).from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_model_and_its_vision_language_model(family: str, tmp_path: Path) -> None:
    text_config, config = configs(family)
    text, both = make(text_config, tmp_path / "text", 1), make(config, tmp_path / "both", 2)
    for sft, aligned, tensors in (("text", "both", (both, text)), ("both", "text", (text, both))):
        with pytest.raises(expo.PlanError, match=r"`on_unpaired='aligned'` keeps aligned's tensors") as caught:
            expo.merge(tmp_path / sft, tmp_path / aligned, ALPHA, tmp_path / "refused")
        message = str(caught.value)
        assert "experts" not in message.splitlines()[0]
        assert len(message.splitlines()) <= 40
        assert "layers.*.mlp" not in message or "vision" in message or "visual" in message
        out = tmp_path / f"{aligned}-out"
        expo.merge(tmp_path / sft, tmp_path / aligned, ALPHA, out, on_unpaired="aligned")
        check_output(out, *tensors)


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    make(configs("qwen3_vl")[0], tmp_path / "text", 1)
    make(configs("llava")[1], tmp_path / "both", 2)
    with pytest.raises(expo.PlanError, match=r"different architectures: sft \S+ is 'qwen3', aligned \S+ is 'llava'"):
        expo.merge(tmp_path / "text", tmp_path / "both", ALPHA, tmp_path / "out", on_unpaired="aligned")


@pytest.mark.parametrize("flag", [True, None])
def test_the_outer_config_decides_about_the_tie(flag: bool | None, tmp_path: Path) -> None:
    """A head that the outer config ties counts as the embedding, although the text_config says that it is not tied."""
    config = configs("llava")[1]
    config.tie_word_embeddings, config.text_config.tie_word_embeddings = True, False
    tensors = make(config, tmp_path / "sft", 1)
    assert not any("lm_head" in name for name in tensors)
    make(config, tmp_path / "aligned", 2)
    file = tmp_path / "aligned" / "model.safetensors"
    aligned = load_file(file)
    embedding = next(name for name in aligned if name.endswith("embed_tokens.weight"))
    aligned[embedding.replace("model.embed_tokens", "lm_head")] = aligned[embedding].clone()
    save_file(aligned, file, metadata={"format": "pt"})
    expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        sft = tensors[name if name in tensors else embedding]
        assert torch.equal(tensor, formula(aligned[name], sft)), name


def test_a_resized_vocabulary_is_in_both_configs(tmp_path: Path) -> None:
    """An adapter with more rows in its embeddings, over a base whose config says the size twice."""
    tensors = make(configs("llava")[1], tmp_path / "base", 1)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": 96}))
    prefix, rows = "base_model.model.", {}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows[prefix + name] = torch.cat([tensors[name], torch.ones(4, 64, dtype=torch.bfloat16)])
    factors = {f"{prefix}language_model.model.layers.0.self_attn.q_proj.lora_{half}.weight": torch.ones(shape)
               for half, shape in (("A", (2, 64)), ("B", (64, 2)))}  # fmt: skip
    (tmp_path / "adapter").mkdir()
    save_file(rows | factors, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    expo.merge(tmp_path / "base", tmp_path / "adapter", ALPHA, tmp_path / "out", on_mismatch="rows")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {**config, "vocab_size": 100, "text_config": {**config["text_config"], "vocab_size": 100}}
    with quiet():
        library: Any = transformers
        _, info = library.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_an_adapter_over_the_names_of_an_older_version(tmp_path: Path) -> None:
    """An adapter whose modules have the names of memory, over a base with the names of older files."""
    peft = pytest.importorskip("peft")
    library: Any = transformers
    new = make(configs("llava")[1], tmp_path / "new", 1)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    renamed = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): tensor for name, tensor in new.items()}
    save_file(renamed, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    with quiet():
        base = library.AutoModelForImageTextToText.from_pretrained(tmp_path / "old", dtype="auto")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(tmp_path / "adapter")
    outs = []
    for folder in ("old", "new"):
        expo.merge(tmp_path / folder, tmp_path / "adapter", ALPHA, tmp_path / f"out-{folder}")
        tensors = load_file(tmp_path / f"out-{folder}" / "model.safetensors")
        outs.append(
            {name.replace("vision_tower.vision_model.", "vision_tower."): each for name, each in tensors.items()}
        )
    assert outs[0].keys() == outs[1].keys() == new.keys()
    assert all(torch.equal(tensor, outs[1][name]) for name, tensor in outs[0].items())
    changed = {name for name, tensor in outs[0].items() if not torch.equal(tensor, new[name])}
    assert len(changed) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 2
