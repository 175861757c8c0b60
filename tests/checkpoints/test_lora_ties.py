"""Adapters over a base whose head is its embedding: the output computes what the trained model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet, read_file, read_folder, safetensors_bytes
from tiny_models import IDS, LOAD, logits

import expo

peft = pytest.importorskip("peft")

VOCABULARY, WIDTH = 64, 32
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

# The modules that PEFT trains, and True if the trained model has a head of its own.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding": ({"modules_to_save": ["embed_tokens"]}, True),
    "embedding, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "head": ({"modules_to_save": ["lm_head"]}, True),
    "head, tied": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "both, tied": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
    "LoRA of the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "LoRA of the head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "LoRA of both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
    "LoRA of the embedding, tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
    "LoRA of the head, tied": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, False),
    "neither": ({}, False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assert HEAD not in read_folder(folder)
    return folder


Train = Callable[..., tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def train(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that saves an adapter and returns its folder and the trained model's logits."""
    folders = tmp_path_factory.mktemp("adapters")

    def trained(settings: dict[str, Any], over: Path = base, rows: int | None = None) -> tuple[Path, torch.Tensor]:
        folder = folders / f"{len(list(folders.iterdir()))}"
        with quiet(), torch.no_grad():
            model = LOAD(over, dtype=torch.float32)
            if rows is not None:
                model.resize_token_embeddings(rows)
            wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **settings}))
            torch.manual_seed(1)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            wrapped.save_pretrained(folder)
            return folder, wrapped.eval()(IDS).logits

    return trained


def floats(folder: Path, name: str) -> torch.Tensor:
    dtype, shape, data = read_folder(folder)[name]
    assert dtype == "F32"
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


def says_tied(folder: Path) -> bool:
    said = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert isinstance(said, bool)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_computes_what_the_trained_model_computes(
    kind: str, base: Path, train: Train, tmp_path: Path
) -> None:
    settings, apart = KINDS[kind]
    adapter, want = train(settings)
    merged = expo.merge(base, adapter, 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5), kind
    assert not settings or (logits(base) - want).abs().max() > 0.01, "the training changed the model"
    assert (HEAD in read_folder(tmp_path / "out")) is apart
    assert says_tied(tmp_path / "out") is not apart
    assert [HEAD in warning for warning in merged.warnings] == [True] * apart
    # the trained tensors are extrapolated, and the others stay the base's
    expo.merge(base, adapter, 0.5, tmp_path / "further")
    for name in (EMBED, HEAD)[: 1 + apart]:
        trained, begun = floats(tmp_path / "out", name), floats(base, EMBED)
        assert torch.allclose(floats(tmp_path / "further", name), trained + 0.5 * (trained - begun), atol=1e-6), name


def test_stream_and_diff_see_both_tensors(base: Path, train: Train, tmp_path: Path) -> None:
    adapter, _ = train({"modules_to_save": ["embed_tokens"]})
    expo.merge(base, adapter, 0.3, tmp_path / "out")
    with pytest.warns(UserWarning, match="tie_word_embeddings false"):
        found = dict(expo.stream(base, adapter, 0.3))
    assert found.keys() == read_folder(tmp_path / "out").keys()
    assert torch.equal(found[HEAD], floats(tmp_path / "out", HEAD))
    assert torch.equal(found[HEAD], floats(base, EMBED)), "the head was not trained"
    named = {each.name for each in expo.compare(base, adapter).tensors}
    assert EMBED in named


def test_a_resized_embedding_stays_the_head(base: Path, train: Train, tmp_path: Path) -> None:
    adapter, want = train({}, rows=VOCABULARY + 2)
    expo.merge(base, adapter, 0.0, tmp_path / "out", on_mismatch="rows")
    assert HEAD not in read_folder(tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5)


def test_a_resized_embedding_of_which_a_copy_was_trained_is_apart(base: Path, train: Train, tmp_path: Path) -> None:
    adapter, want = train({"modules_to_save": ["embed_tokens"]}, rows=VOCABULARY + 2)
    expo.merge(base, adapter, 0.0, tmp_path / "out", on_mismatch="rows")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5)
    assert not says_tied(tmp_path / "out")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_base_that_is_tied_and_stores_its_head_all_the_same(
    module: str, base: Path, train: Train, tmp_path: Path
) -> None:
    stored = Path(shutil.copytree(base, tmp_path / "stored"))
    tensors = read_folder(base)
    (stored / "model.safetensors").write_bytes(safetensors_bytes({**tensors, HEAD: tensors[EMBED]}))
    adapter, want = train({"modules_to_save": [module]}, over=stored)
    expo.merge(stored, adapter, 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5)
    assert not says_tied(tmp_path / "out")


def test_a_base_in_shards_of_bin_files(base: Path, train: Train, tmp_path: Path) -> None:
    adapter, want = train({"modules_to_save": ["embed_tokens"]})
    folder = Path(shutil.copytree(base, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors")))
    tensors = {name: floats(base, name) for name in read_folder(base)}
    tensors[EMBED] = tensors[EMBED].t().contiguous().t()  # a matrix that is stored transposed
    torch.save(tensors, folder / "pytorch_model.bin")
    expo.merge(folder, adapter, 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5)


FAMILIES: dict[str, tuple[Any, str]] = {
    "Qwen 2": (transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True), "embed_tokens"),
    "OPT": (
        transformers.OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=1,
                               num_attention_heads=4, max_position_embeddings=16, word_embed_proj_dim=WIDTH),
        "embed_tokens",
    ),
    "GPT-2": (
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=4, n_positions=16,
                                bos_token_id=0, eos_token_id=0), "wte",
    ),
    "BLOOM": (
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=4, bos_token_id=0,
                                 eos_token_id=0), "word_embeddings",
    ),
    "GPT-NeoX": (
        transformers.GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
                                   num_attention_heads=4, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0),
        "embed_in",
    ),
    "Mamba": (
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, state_size=4),
        "embeddings",
    ),
}  # fmt: skip
TARGETS = {"OPT": ["q_proj"], "GPT-2": ["c_attn"], "BLOOM": ["query_key_value"], "GPT-NeoX": ["query_key_value"],
           "Mamba": ["in_proj"]}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["embedding", "head", "embedding, said to be tied", "LoRA, said to be tied"])
def test_other_families(family: str, kind: str, train: Train, tmp_path: Path) -> None:
    """PEFT ties only modules with the names embed_tokens and lm_head, whatever `ensure_weight_tying` says."""
    config, module = FAMILIES[family]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    targets = TARGETS.get(family, ["q_proj"])
    settings: dict[str, Any] = {"target_modules": targets, "ensure_weight_tying": "said" in kind}
    if kind.startswith("LoRA"):
        settings["target_modules"] = [*targets, module]
    else:
        settings["modules_to_save"] = ["lm_head" if kind == "head" else module]
    adapter, want = train(settings, over=tmp_path / "base")
    expo.merge(tmp_path / "base", adapter, 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-4)
    assert (logits(tmp_path / "base") - want).abs().max() > 0.01, "the training changed the model"


@pytest.mark.parametrize("modules", [["head"], ["tokens"], ["model.embed_tokens"]], ids=str)
def test_modules_to_save_by_the_end_of_a_name(modules: list[str], base: Path, train: Train, tmp_path: Path) -> None:
    """PEFT compares names as str.endswith does, not by their parts."""
    adapter, want = train({"modules_to_save": modules})
    expo.merge(base, adapter, 0.0, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-5)
    assert not says_tied(tmp_path / "out")


def test_an_empty_trained_copy_is_refused(base: Path, train: Train, tmp_path: Path) -> None:
    for module in ("embed_tokens", "norm"):
        adapter, _ = train({"modules_to_save": [module]})
        file = adapter / "adapter_model.safetensors"
        emptied = {key: (dtype, (0,), b"") if module in key else (dtype, shape, data)
                   for key, (dtype, shape, data) in read_file(file).items()}  # fmt: skip
        file.write_bytes(safetensors_bytes(emptied))
        for option in ("error", "aligned"):
            with pytest.raises(expo.PlanError, match="gathered before saving") as caught:
                expo.merge(base, adapter, 0.3, tmp_path / "out", on_mismatch=option)
            assert "--on" not in str(caught.value)


def test_a_classifier_has_no_head_to_untie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, pad_token_id=0, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"], task_type="SEQ_CLS"
    )
    with quiet():
        peft.get_peft_model(model, how).save_pretrained(tmp_path / "adapter")
    merged = expo.merge(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out")
    assert not merged.warnings or "lm_head" not in str(merged.warnings)
    assert read_folder(tmp_path / "out").keys() == read_folder(tmp_path / "base").keys()


def test_a_tie_that_is_not_known_here_is_refused_and_the_advice_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=64, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    ids = torch.tensor([[1, 2, 3]])
    with quiet(), torch.no_grad():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q"], modules_to_save=["lm_head"]))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        wrapped.save_pretrained(tmp_path / "adapter")
        want = wrapped.eval()(input_ids=ids, decoder_input_ids=ids).logits
        whole = wrapped.merge_and_unload()
    with pytest.raises(expo.CheckpointError, match="only if its logits are the trained model's"):
        expo.merge(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out")
    whole.save_pretrained(tmp_path / "whole")
    with quiet(), torch.no_grad():
        alone = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
        assert torch.allclose(alone(input_ids=ids, decoder_input_ids=ids).logits, want, atol=1e-5), "a tie is asked for"
    expo.merge(tmp_path / "base", tmp_path / "whole", 0.0, tmp_path / "out")
    with quiet(), torch.no_grad():
        made = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert torch.allclose(made(input_ids=ids, decoder_input_ids=ids).logits, want, atol=1e-5)
