"""Tests of the names in memory: they pair with the names in files, in both directions and for adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet
from plans import checkpoint, make_plan
from safetensors.torch import load_file
from tiny_models import pair_of

import expo
from expo.checkpoints.lora import _BaseNames
from expo.checkpoints.memory_names import MemoryNames
from expo.checkpoints.safetensors_header import TensorInfo

ALPHA = 0.3
CASES = [
    ("GPTNeoXForCausalLM gpt_neox", "embed_out.weight", "lm_head.weight"),
    ("HyperCLOVAXVisionV2ForConditionalGeneration hyperclovax_vision_v2", "model.vision_projector.weight",
     "model.projector.weight"),
    ("LlavaForConditionalGeneration llava", "language_model.model.norm.weight", "model.language_model.norm.weight"),
    ("LlavaForConditionalGeneration llava", "language_model.lm_head.weight", "lm_head.weight"),
    ("LlamaForCausalLM exaone", "transformer.h.0.attn.attention.q_proj.weight",
     "model.layers.0.self_attn.q_proj.weight"),
    ("ExaoneMoeForCausalLM exaone_moe", "model.layers.1.mlp.e_score_correction_bias",
     "model.layers.1.mlp.gate.e_score_correction_bias"),
    ("ALlavaForSequenceClassification llava", "language_model.lm_head.weight", "lm_head.weight"),
    ("FlintForCausalLM flint", "model.layers.0.self_attn.softmax_offset", "model.layers.0.self_attn.sinks"),
]  # fmt: skip
EXAONE: Any = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """Return the fields of a config for `Class model_type`."""
    architecture, _, model_type = kind.partition(" ")
    return {"architectures": [architecture], "model_type": model_type}


@pytest.mark.parametrize(("kind", "in_file", "in_memory"), CASES)
def test_a_name_in_memory_and_its_name_in_the_file(kind: str, in_file: str, in_memory: str) -> None:
    config = config_of(kind)
    names = MemoryNames(config)
    assert names.find(in_file) == names.find(in_memory) == names.find(f"module.{in_file}") == in_memory
    file, memory = ({name: ("BF16", (6, 4)), "same": ("BF16", (2,))} for name in (in_file, in_memory))
    for sft, aligned, sft_name, name in ((file, memory, in_file, in_memory), (memory, file, in_memory, in_file)):
        plan = make_plan(checkpoint(sft, config=config), checkpoint(aligned, config=config), [ALPHA])
        plan.check()
        assert plan.noted == ((name, f"sft calls it {sft_name}"),)
        assert plan.dropped == {}


def test_a_rename_that_matches_its_own_result() -> None:
    """The name in memory is no published name, although the expression for published names matches it."""
    config = config_of("LagunaForCausalLM laguna")
    names = [f"model.layers.1.mlp.{module}.up_proj.weight" for module in ("shared_expert", "shared_experts")]
    assert MemoryNames(config).find(names[0]) == names[1] == MemoryNames(config).find(names[1])
    for one, other in (names, names[::-1]):
        plan = make_plan(*(checkpoint({name: ("BF16", (6, 4))}, config=config) for name in (one, other)), [ALPHA])
        plan.check()
        assert plan.noted == ((other, f"sft calls it {one}"),)
    found = {names[0]: TensorInfo(names[0], "BF16", (6, 4), 0, 48)}
    assert _BaseNames(found, MemoryNames(config)).find(names[1]) == names[0]


@pytest.mark.parametrize("architectures", [None, [], [7], ["LlamaForCausalLM"], "LlavaForConditionalGeneration"])
@pytest.mark.parametrize("model_type", [None, "llama", 7])
def test_a_model_that_is_not_in_the_table(architectures: Any, model_type: Any) -> None:
    names = MemoryNames({"architectures": architectures, "model_type": model_type})
    assert not names
    assert names.find("module.language_model.lm_head.weight") == "language_model.lm_head.weight"


def test_a_tensor_of_another_shape_and_two_tensors_of_one_name_stay_unpaired() -> None:
    kind, in_file, in_memory = CASES[-1]
    config = config_of(kind)
    for sft in ({in_file: ("BF16", (5, 4))}, {in_file: ("BF16", (6, 4)), f"module.{in_file}": ("BF16", (6, 4))}):
        plan = make_plan(
            checkpoint(sft, config=config), checkpoint({in_memory: ("BF16", (6, 4))}, config=config), [0.3]
        )
        (problem,) = plan.problems
        assert f"{in_memory} (aligned only)" in problem


@pytest.mark.parametrize(
    ("model_type", "in_file", "in_memory"),
    [
        # norm1 of the file is norm2 in memory, and norm0 is norm1.
        ("kimi_k25", "vision_tower.encoder.blocks.0.norm1.weight", "model.vision_tower.layers.0.norm1.weight"),
        # The rows of this matrix have another order in memory.
        ("mistral_large4", "vision_encoder.transformer.layers.0.attention.wq.weight",
         "model.vision_tower.transformer.layers.0.attention.q_proj.weight"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_converted_in_another_way_is_not_paired(model_type: str, in_file: str, in_memory: str) -> None:
    config = {"model_type": model_type}
    file, memory = ({name: ("BF16", (6, 6)), "same": ("BF16", (2,))} for name in (in_file, in_memory))
    for sft, aligned in ((file, memory), (memory, file)):
        (problem,) = make_plan(checkpoint(sft, config=config), checkpoint(aligned, config=config), [ALPHA]).problems
        assert "they look like the same tensors under other names or in another form" in problem
        assert f"  {in_file} (" in problem
        assert f"  {in_memory} (" in problem


@pytest.fixture(scope="module")
def exaone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return sft and aligned of a model whose layers have other names in memory than in files."""
    library: Any = transformers
    torch.manual_seed(0)
    with quiet():
        pair = pair_of(
            library.AutoModelForCausalLM.from_config(library.ExaoneConfig(**EXAONE)), tmp_path_factory.mktemp("exaone")
        )
    assert "transformer.h.0.attn.attention.q_proj.weight" in load_file(pair[0] / "model.safetensors")
    return pair


@pytest.mark.parametrize("saved", ["sft", "aligned"])
def test_a_model_that_accelerate_saved(saved: str, exaone: tuple[Path, Path], tmp_path: Path) -> None:
    """accelerate's save_model writes the names in memory; the numbers are those of a merge of both folders."""
    accelerate = pytest.importorskip("accelerate")
    library: Any = transformers
    folders = dict(zip(("sft", "aligned"), exaone, strict=True))
    expo.merge(*exaone, ALPHA, tmp_path / "expected")
    with quiet():
        model = library.AutoModelForCausalLM.from_pretrained(folders[saved], dtype="auto")
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path / saved)
    shutil.copy(folders[saved] / "config.json", tmp_path / saved)
    folders[saved] = tmp_path / saved
    expo.merge(folders["sft"], folders["aligned"], ALPHA, tmp_path / "out")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    names = MemoryNames(json.loads((exaone[0] / "config.json").read_text()))
    assert found.keys() == ({names.find(name) for name in expected} if saved == "aligned" else expected.keys())
    for name, tensor in expected.items():
        assert torch.equal(found[names.find(name) if saved == "aligned" else name], tensor), name
    with quiet():
        _, info = library.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_an_adapter_with_the_names_of_memory(exaone: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    library: Any = transformers
    with quiet():
        base = library.AutoModelForCausalLM.from_pretrained(exaone[0], dtype="auto")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(tmp_path / "adapter")
        expo.merge(exaone[0], tmp_path / "adapter", ALPHA, tmp_path / "out")
        before, after = (library.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
                         for folder in (exaone[0], tmp_path / "out"))  # fmt: skip
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    inner = model.base_model.model
    for name in changed:
        delta = inner.get_submodule(name.removesuffix(".weight")).get_delta_weight("default").float()
        wanted = (before[name].float() + (1 + ALPHA) * delta).to(torch.bfloat16)
        assert torch.allclose(after[name].float(), wanted.float(), rtol=2**-7, atol=1e-6), name
