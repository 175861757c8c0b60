"""Tests of the table of ties: it is the installed transformers', and its names are found in both directions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from plans import checkpoint, make_plan

from expo.checkpoints.tied_weights import TABLE, TiedNames

SOURCE = Path(__file__).parents[1] / "architectures" / "tied_classes.py"
CASES = [
    ("MambaForCausalLM", "backbone.embeddings.weight", "lm_head.weight"),
    ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("BertForMaskedLM", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("RobertaForCausalLM", "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("OpenAIGPTLMHeadModel", "transformer.tokens_embed.weight", "lm_head.weight"),
    ("CTRLLMHeadModel", "transformer.w.weight", "lm_head.weight"),
    ("XLNetLMHeadModel", "transformer.word_embedding.weight", "lm_loss.weight"),
    ("WhisperForConditionalGeneration", "model.decoder.embed_tokens.weight", "proj_out.weight"),
    ("EncoderDecoderModel", "decoder.cls.predictions.bias", "decoder.cls.predictions.decoder.bias"),
    ("Qwen3VLForConditionalGeneration", "model.language_model.embed_tokens.weight", "lm_head.weight"),
]


@pytest.mark.parametrize(("kind", "source", "tied"), CASES)
@pytest.mark.parametrize("flag", [None, True])
def test_a_tied_weight_under_either_name(kind: str, source: str, tied: str, flag: bool | None) -> None:
    config = {"architectures": [kind], **({} if flag is None else {"tie_word_embeddings": flag})}
    config["decoder"] = {"model_type": "bert"}  # the decoder of an EncoderDecoderModel
    ndim = 1 if source.endswith("bias") else 2
    one, both = (dict.fromkeys(names, ("BF16", (6, 4)[:ndim])) for names in ((source,), (source, tied)))
    other = {tied: one[source]}
    for sft, aligned, pairs, dropped in (
        (one, both, {source: source, tied: source}, {}),
        (both, one, {source: source}, {tied: f"aligned ties it to {source}"}),
        (other, both, {source: tied, tied: tied}, {}),
        (both, other, {tied: tied}, {source: f"aligned ties it to {tied}"}),
        (one, other, {tied: source}, {}),
        (other, one, {source: tied}, {}),
    ):
        plan = make_plan(checkpoint(sft, config=config), checkpoint(aligned, config=config), [0.3])
        plan.check()
        assert {step.name: step.sft.name for step in plan.steps if step.sft} == pairs
        assert plan.dropped == dropped
        assert all(step.reason == (f"sft ties it to {step.sft.name}" if step.sft.name != step.name else "")
                   for step in plan.steps if step.sft)  # fmt: skip


@pytest.mark.parametrize(("kind", "source", "tied"), CASES[:3])
def test_a_config_that_denies_the_tie_prevents_it(kind: str, source: str, tied: str) -> None:
    config = {"architectures": [kind], "tie_word_embeddings": False}
    ndim = 1 if source.endswith("bias") else 2
    one, both = (dict.fromkeys(names, ("BF16", (6, 4)[:ndim])) for names in ((source,), (source, tied)))
    for sft, aligned in ((one, both), (both, one)):
        (problem,) = make_plan(checkpoint(sft, config=config), checkpoint(aligned, config=config), [0.3]).problems
        assert tied in problem


@pytest.mark.parametrize(
    ("architectures", "name", "source"),
    [
        (["module of no table"], "lm_head.weight", "lm_head.weight"),
        (None, "lm_head.weight", "lm_head.weight"),
        ([7], "lm_head.weight", "lm_head.weight"),
        (["LlamaForCausalLM"], "module.lm_head.weight", "model.embed_tokens.weight"),
        (["LlamaForCausalLM"], "lm_head.weight_scale", "lm_head.weight_scale"),
        (["LlamaForCausalLM"], "other.lm_head.weight", "other.lm_head.weight"),
        (["DeformableDetrForObjectDetection"], "bbox_embed.3.layers.0.bias", "bbox_embed.0.layers.0.bias"),
        (["DeformableDetrForObjectDetection"], "model.decoder.norm.weight", "model.decoder.norm.weight"),
    ],
)  # fmt: skip
def test_the_source_of_a_name(architectures: Any, name: str, source: str) -> None:
    assert TiedNames([{"architectures": architectures}]).source(name) == source


def test_two_twins_without_their_source_are_no_choice() -> None:
    names = TiedNames([{"architectures": ["T5ForConditionalGeneration"]}])
    head, shared = "lm_head.weight", "shared.weight"
    others = {name: name for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
    assert names.find({head: head}, others) == {}
    assert names.find({head: head}, {**others, shared: shared}) == {head: shared}


def test_a_tie_whose_source_has_another_name_in_the_file() -> None:
    config: dict[str, Any] = {"architectures": ["T5Gemma2ForConditionalGeneration"], "model_type": "t5gemma2"}
    config["encoder"] = {"model_type": "t5gemma2_encoder"}
    file = {"model.encoder.embed_tokens.weight": ("BF16", (6, 4))}
    memory = dict.fromkeys(
        (
            "model.encoder.text_model.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.out_proj.weight",
        ),
        ("BF16", (6, 4)),
    )
    plan = make_plan(checkpoint(file, config=config), checkpoint(memory, config=config), [0.3])
    plan.check()
    assert {step.name: step.sft.name for step in plan.steps if step.sft} == dict.fromkeys(memory, next(iter(file)))
    plan = make_plan(checkpoint(memory, config=config), checkpoint(file, config=config), [0.3])
    plan.check()
    assert plan.dropped == dict.fromkeys(list(memory)[1:], f"aligned ties it to {next(iter(file))}")


@pytest.mark.exhaustive
def test_the_table_is_that_of_the_installed_transformers() -> None:
    spec = importlib.util.spec_from_file_location("tied_classes", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = json.loads(Path(TABLE).read_text())
    if table["transformers"] != transformers.__version__:
        pytest.skip(
            f"the table is of transformers {table['transformers']}, and {transformers.__version__} is installed"
        )
    assert Path(TABLE).read_text() == module.table_text(module.declared_ties())


def test_zamba_shares_the_transformer_of_its_first_hybrid_layer() -> None:
    config = {"model_type": "zamba", "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
    first, third = (f"model.layers.{layer}.shared_transf.pre_ff_layernorm.weight" for layer in (1, 3))
    one, both = {first: ("BF16", (6,))}, {first: ("BF16", (6,)), third: ("BF16", (6,))}
    plan = make_plan(checkpoint(one, config=config), checkpoint(both, config=config), [0.3])
    plan.check()
    assert {step.name: step.sft.name for step in plan.steps if step.sft} == {first: first, third: first}
    plan = make_plan(checkpoint(both, config=config), checkpoint(one, config=config), [0.3])
    plan.check()
    assert plan.dropped == {third: f"aligned ties it to {first}"}
    other = {**config, "layers_block_type": ["mamba"] * 4}
    assert make_plan(checkpoint(one, config=other), checkpoint(both, config=other), [0.3]).problems


@pytest.mark.parametrize("flag", [True, False])
def test_the_setting_of_a_decoder_counts_for_its_own_head(flag: bool) -> None:
    """The outer setting is about another tie, that of an encoder's and a decoder's embeddings."""
    config = {
        "architectures": ["VisionEncoderDecoderModel"], "tie_word_embeddings": not flag,
        "decoder": {"model_type": "bert", "tie_word_embeddings": flag},
    }  # fmt: skip
    source, tied = "decoder.cls.predictions.bias", "decoder.cls.predictions.decoder.bias"
    one, both = {source: ("BF16", (6,))}, {source: ("BF16", (6,)), tied: ("BF16", (6,))}
    plan = make_plan(checkpoint(one, config=config), checkpoint(both, config=config), [0.3])
    assert (plan.problems == ()) is flag


def test_sinusoids_of_marian_are_no_weights() -> None:
    """A state dict has them, and save_pretrained leaves them out, as the class says."""
    names = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]
    assert transformers.MarianMTModel._keys_to_ignore_on_save == names
    weight = {"model.shared.weight": ("BF16", (6, 4))}
    state = {**weight, **dict.fromkeys(names, ("BF16", (8, 4)))}
    for config, fits in (({"model_type": "marian"}, True), ({"model_type": "bart"}, False)):
        plan = make_plan(checkpoint(state, config=config), checkpoint(weight, config=config), [0.3])
        assert (plan.problems == ()) is fits
        assert (plan.dropped == dict.fromkeys(names, "positions, which the model computes")) is fits
        plan = make_plan(checkpoint(weight, config=config), checkpoint(state, config=config), [0.3])
        assert (plan.problems == ()) is fits
