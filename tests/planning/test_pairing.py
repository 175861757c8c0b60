"""Tests of pairing: renames, ties and buffers of real models are found, and other tensors are never paired."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import random_tensors, read_folder, write_folder
from plans import ALPHA, COPY, EXTRAPOLATE, Shapes, checkpoint, fates, make_plan

import expo
from expo.checkpoints.model_parts import is_embedding, tie_flag
from expo.planning.pairing import Pairs, pair
from expo.planning.plan import Plan

D, V = 4, 10
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BUFFER, DROPPED_BUFFER = "a buffer, which the model computes, and no weight", "a buffer, which the model computes"


def bf16(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "BF16", shape


def named(*names: str, shape: tuple[int, ...] = (V, D)) -> Shapes:
    return dict.fromkeys(names, ("BF16", shape))


def pairs(
    sft: Shapes, aligned: Shapes, sft_config: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> Pairs:
    """Pair two models, and assert that each tensor of both has one place in the result."""
    matched = pair(checkpoint(sft, "/models/sft", config=sft_config), checkpoint(aligned, config=config))
    assert sorted([*matched.counterparts, *matched.kept, *matched.only_in_aligned]) == sorted(aligned)
    used = {other.tensor.name for other in matched.counterparts.values()} | (set(matched.kept) & set(sft))
    of_sft = [*used, *matched.dropped, *matched.only_in_sft]
    assert sorted(of_sft) == sorted(sft), "no tensor is listed twice or lost"
    assert all(reason for reason in [*matched.kept.values(), *matched.dropped.values()])
    for name, (tensor, reason) in matched.counterparts.items():
        assert bool(reason) is (tensor.name != name), "a pair has a reason exactly if its names differ"
    return matched


def counterparts(matched: Pairs) -> dict[str, str]:
    return {name: other.tensor.name for name, other in matched.counterparts.items()}


def planned(sft: Shapes, aligned: Shapes, **options: Any) -> Plan:
    return make_plan(checkpoint(sft, "/models/sft"), checkpoint(aligned), [ALPHA], **options)


# Renames.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("module.model.norm.weight", "model.norm.weight", id="DDP, DeepSpeed"),
        pytest.param("_orig_mod.model.norm.weight", "model.norm.weight", id="torch.compile"),
        pytest.param("model._orig_mod.norm.weight", "model.norm.weight", id="torch.compile of a part"),
        pytest.param("_orig_mod.module.model.norm.weight", "model.norm.weight", id="compiled DDP"),
        pytest.param("module._orig_mod.model.norm.weight", "model.norm.weight", id="DDP of a compiled one"),
        pytest.param(
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q.weight",
            "model.layers.0.q.weight", id="FSDP and activation checkpointing",
        ),
        pytest.param("base_model.model.model.norm.weight", "model.norm.weight", id="PEFT"),
        pytest.param("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", id="Llama without its head"),
        pytest.param("h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias", id="GPT-2 without its head"),
        pytest.param("word_embeddings.weight", "transformer.word_embeddings.weight", id="BLOOM without its head"),
        pytest.param("embed_in.weight", "gpt_neox.embed_in.weight", id="GPT-NeoX without its head"),
        pytest.param("embed_out.weight", "lm_head.weight", id="GPT-NeoX's head"),
        pytest.param("encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight", id="BERT"),
        pytest.param("encoder.layer.0.output.dense.bias", "roberta.encoder.layer.0.output.dense.bias", id="RoBERTa"),
        pytest.param("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight", id="gamma"),
        pytest.param("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias", id="beta"),
        pytest.param("language_model.model.norm.weight", "model.language_model.norm.weight", id="LLaVA"),
        pytest.param("language_model.lm_head.weight", "lm_head.weight", id="LLaVA's head"),
        pytest.param("multi_modal_projector.norm.bias", "model.multi_modal_projector.norm.bias", id="projector"),
        pytest.param("image_newline", "model.image_newline", id="LLaVA-NeXT"),
        pytest.param(
            "vision_tower.vision_model.encoder.layers.0.q.weight",
            "model.vision_tower.vision_model.encoder.layers.0.q.weight", id="LLaVA's tower, 4.52",
        ),
        pytest.param(
            "vision_tower.vision_model.pre_layrnorm.weight", "vision_tower.pre_layrnorm.weight", id="LLaVA's tower, 5"
        ),
        pytest.param(
            "vision_tower.vision_model.pre_layrnorm.weight", "model.vision_tower.pre_layrnorm.weight", id="in memory"
        ),
        pytest.param("model.norm.weight", "model.language_model.norm.weight", id="Qwen2-VL"),
        pytest.param("visual.patch_embed.proj.weight", "model.visual.patch_embed.proj.weight", id="Qwen2-VL's tower"),
        pytest.param(
            "encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            id="weight_norm",
        ),
    ],
)  # fmt: skip
def test_a_known_rename_works_both_ways(one: str, other: str) -> None:
    for sft, aligned in ((one, other), (other, one)):
        matched = pairs(named("same", sft), named("same", aligned))
        assert counterparts(matched) == {"same": "same", aligned: sft}
        assert matched.counterparts[aligned].reason == f"sft calls it {sft}"
        plan = planned(named("same", sft), named("same", aligned))
        plan.check()
        assert plan.noted == ((aligned, f"sft calls it {sft}"),)
        assert plan.steps[1].sft is not None
        assert plan.steps[1].sft.name == sft


@pytest.mark.parametrize(
    ("sft", "aligned"),
    [
        pytest.param({"norm.weight": bf16(4)}, {"model.norm.weight": bf16(5)}, id="another shape"),
        pytest.param({"norm.weight": bf16(4)}, {"model.norm.weight": bf16(4, 1)}, id="another rank"),
        pytest.param(named("norm.weight"), named("model.norm.weight.x", "model.final_norm.weight"), id="other names"),
        pytest.param(named("x.weight", "module.model.x.weight"), named("model.x.weight"), id="two in sft"),
        pytest.param(named("x.weight"), named("model.x.weight", "transformer.x.weight"), id="two in aligned"),
        pytest.param(named("a.gamma"), named("a.bias"), id="a scale and a bias"),
        pytest.param(named("model.layers.1.q.weight"), named("model.layers.10.q.weight"), id="another layer"),
        pytest.param(named("encoder.q.weight"), named("decoder.q.weight"), id="another half"),
        pytest.param(named("visual.norm.weight"), named("model.norm.weight"), id="the tower and the model"),
        pytest.param(named("vision_tower.norm.weight"), named("model.language_model.norm.weight"), id="another part"),
        pytest.param(named("model.module.x.weight"), named("model.x.weight"), id="module is a name inside a model"),
        pytest.param(named("models.x.weight"), named("x.weight"), id="models is not model"),
        pytest.param(named("score.weight"), named("lm_head.weight"), id="a reward model's head"),
        pytest.param(named("model.mlp.experts.gate_up_proj"), named("model.mlp.experts.0.gate_proj.weight"), id="MoE"),
    ],
)  # fmt: skip
def test_a_tensor_that_fits_no_rename_or_two_stays_unpaired(sft: Shapes, aligned: Shapes) -> None:
    config = {"tie_word_embeddings": False}
    matched = pairs({**sft, "same": bf16(1)}, {**aligned, "same": bf16(1)}, config, config)
    assert counterparts(matched) == {"same": "same"}
    assert (matched.only_in_aligned, matched.only_in_sft) == (list(aligned), list(sft))
    (problem,) = planned(sft, aligned).problems
    for name in aligned:
        assert f"{name} (aligned only)" in problem
    for name in sft:
        assert f"{name} (sft only)" in problem


def test_a_name_that_both_have_is_never_renamed() -> None:
    shared = named("model.x.weight", "x.weight")
    assert counterparts(pairs(shared, shared)) == {name: name for name in shared}
    matched = pairs(shared, named("model.x.weight"))
    assert counterparts(matched) == {"model.x.weight": "model.x.weight"}
    assert matched.only_in_sft == ["x.weight"]


def test_the_shape_decides_between_two_candidates_of_a_rename() -> None:
    sft = {"x.weight": bf16(3), "module.model.x.weight": bf16(4)}
    matched = pairs(sft, {"model.x.weight": bf16(4)})
    assert counterparts(matched) == {"model.x.weight": "module.model.x.weight"}
    assert matched.only_in_sft == ["x.weight"]


def llama(prefix: str, layers: int = 3) -> Shapes:
    parts = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    return {
        f"{prefix}embed_tokens.weight": bf16(V, D),
        **{f"{prefix}layers.{i}.{part}": bf16(D, D) for i in range(layers) for part in parts},
        f"{prefix}norm.weight": bf16(D),
    }


def test_a_whole_model_under_another_prefix_in_aligneds_order() -> None:
    aligned = {**llama("model."), HEAD: bf16(V, D)}
    sft = dict(reversed({**llama("module.model."), "module.lm_head.weight": bf16(V, D)}.items()))
    matched = pairs(sft, aligned, UNTIED, UNTIED)
    assert counterparts(matched) == {name: f"module.{name}" for name in aligned}
    plan = planned(sft, aligned)
    plan.check()
    assert [step.name for step in plan.steps] == list(aligned)
    assert plan.dropped == {}


def test_a_base_model_saved_without_its_head() -> None:
    sft, aligned = llama(""), {**llama("model."), HEAD: bf16(V, D)}
    matched = pairs(sft, aligned, UNTIED, UNTIED)
    assert matched.only_in_aligned == [HEAD], "the models are not tied, so the user decides about the head"
    assert counterparts(matched) == {name: name.removeprefix("model.") for name in aligned if name != HEAD}
    tied = pairs(sft, aligned, TIED, TIED)
    assert counterparts(tied)[HEAD] == "embed_tokens.weight"
    assert tied.counterparts[HEAD].reason == "sft ties it to embed_tokens.weight"
    assert pairs(aligned, sft, UNTIED, UNTIED).only_in_sft == [HEAD]


@pytest.mark.parametrize(
    ("old", "new", "n", "paired"),
    [
        ("module.model.layers.{}.experts.{}.weight", "model.layers.{}.experts.{}.weight", 50_000, True),
        ("one.layers.{}.output.{}.weight", "other.layers.{}.output.{}.weight", 10_000, False),
        ("one{}x{}.lm_head.weight", "other{}x{}.embed_tokens.weight", 10_000, False),
        ("one{}x{}.lm_head.weight", "other{}x{}.lm_head.weight", 10_000, False),
        ("one.{}.{}.rotary_emb.inv_freq", "other.{}.{}.attn.masked_bias", 10_000, None),
    ],
)
def test_tens_of_thousands_of_names_take_no_time(old: str, new: str, n: int, paired: bool | None) -> None:
    sft, aligned = ({name.format(i // 500, i % 500): bf16(D, D) for i in range(n)} for name in (old, new))
    one, other = checkpoint(sft), checkpoint(aligned)
    started = time.process_time()
    matched = pair(one, other)
    assert time.process_time() - started < 3
    assert len(matched.counterparts) == (n if paired else 0)
    assert len(matched.only_in_sft) == len(matched.only_in_aligned) == (n if paired is False else 0)
    assert len(matched.kept) == len(matched.dropped) == (n if paired is None else 0)


def test_the_numbers_are_those_of_the_counterpart_wherever_it_lies(tmp_path: Path) -> None:
    """A merge with a rename, a tie and a buffer in other shards gives the bytes of a merge without them."""
    weights = {**llama("model."), "model.norm.weight": ("F32", (D,))}
    tensors = random_tensors(weights, 1)
    write_folder(tmp_path / "aligned", random_tensors({**weights, HEAD: bf16(V, D)}, 2), shards=2)
    write_folder(tmp_path / "plain", {**tensors, HEAD: tensors[EMBED]})
    old = {"module.rotary_emb.inv_freq": ("F32", (2,), bytes(8))}
    old |= {f"module.{name}": tensor for name, tensor in reversed(tensors.items())}
    write_folder(tmp_path / "old", old, shards=3)
    for sft in ("plain", "old"):
        expo.merge(tmp_path / sft, tmp_path / "aligned", ALPHA, tmp_path / f"from-{sft}", quiet=True)
    assert read_folder(tmp_path / "from-old") == read_folder(tmp_path / "from-plain")
    assert read_folder(tmp_path / "from-old") != read_folder(tmp_path / "aligned")


# Ties.


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        pytest.param(EMBED, HEAD, id="Llama, Qwen2, Gemma"),
        pytest.param("transformer.wte.weight", HEAD, id="GPT-2"),
        pytest.param("transformer.word_embeddings.weight", HEAD, id="BLOOM"),
        pytest.param("gpt_neox.embed_in.weight", "embed_out.weight", id="GPT-NeoX"),
        pytest.param("model.tok_embeddings.weight", "output.weight", id="InternLM2"),
        pytest.param("shared.weight", HEAD, id="T5"),
        pytest.param("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", id="LLaVA"),
        pytest.param("language_model.model.tok_embeddings.weight", "language_model.output.weight", id="InternVL"),
        pytest.param("model.language_model.embed_tokens.weight", HEAD, id="LLaVA since 4.52"),
        pytest.param("module.model.embed_tokens.weight", "module.lm_head.weight", id="wrapped"),
    ],
)
@pytest.mark.parametrize(
    "config", [{}, TIED, {"text_config": TIED}, {"text_config": None}, {"text_config": [1]}], ids=str
)
def test_a_tie_stored_on_one_side(embedding: str, head: str, config: dict[str, Any]) -> None:
    one, both = named(embedding), named(embedding, head)
    matched = pairs(one, both, config, config)
    assert counterparts(matched) == {embedding: embedding, head: embedding}
    assert matched.counterparts[head].reason == f"sft ties it to {embedding}"
    matched = pairs(both, one, config, config)
    assert counterparts(matched) == {embedding: embedding}
    assert matched.dropped == {head: f"aligned ties it to {embedding}"}
    # A file that has tied tensors once may have them under the head's name.
    head_alone = named(head)
    assert counterparts(pairs(head_alone, both, config, config)) == {embedding: head, head: head}
    assert pairs(both, head_alone, config, config).dropped == {embedding: f"aligned ties it to {head}"}
    matched = pairs(head_alone, one, config, config)
    assert counterparts(matched) == {embedding: head}
    assert (matched.dropped, matched.only_in_sft) == ({}, []), "a tensor that is read is not dropped"


@pytest.mark.parametrize(
    ("sft", "aligned", "paired", "dropped"),
    [
        ({}, {}, True, True),
        (TIED, TIED, True, True),
        ({}, TIED, True, True),
        (TIED, {}, True, True),
        (UNTIED, UNTIED, False, False),
        (UNTIED, {}, False, False),
        (UNTIED, TIED, False, False),
        ({}, UNTIED, False, False),
        pytest.param(TIED, UNTIED, True, False, id="sft's head is its embedding, and aligned's is not"),
        ({"text_config": UNTIED}, {}, False, False),
        ({}, {"text_config": UNTIED}, False, False),
        ({**TIED, "text_config": UNTIED}, TIED, True, True),
        ({**UNTIED, "text_config": TIED}, TIED, False, False),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": "yes"}, True, True),
    ],
)
def test_a_config_without_a_tie_prevents_it(
    sft: dict[str, Any], aligned: dict[str, Any], paired: bool, dropped: bool
) -> None:
    """The configs decide about a head that one model has alone.

    Args:
        sft: The config of sft.
        aligned: The config of aligned.
        paired: True if sft's embedding is the counterpart of a head that aligned has alone.
        dropped: True if a head that sft has alone is dropped without an option.
    """
    matched = pairs(named(EMBED), named(EMBED, HEAD), sft, aligned)
    assert matched.only_in_aligned == ([] if paired else [HEAD])
    matched = pairs(named(EMBED, HEAD), named(EMBED), sft, aligned)
    assert matched.only_in_sft == ([] if dropped else [HEAD])


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        ({}, None), (TIED, True), (UNTIED, False), ({"text_config": TIED}, True), ({"text_config": UNTIED}, False),
        ({**TIED, "text_config": UNTIED}, True), ({**UNTIED, "text_config": TIED}, False), ({"text_config": "x"}, None),
        ({"tie_word_embeddings": None}, None), ({"tie_word_embeddings": None, "text_config": TIED}, True),
    ],
)  # fmt: skip
def test_tie_flag(config: dict[str, Any], flag: bool | None) -> None:
    assert tie_flag(config) is flag


def test_a_dropped_head_needs_no_option_and_is_named() -> None:
    plan = planned(named(EMBED, HEAD), named(EMBED))
    plan.check()
    assert plan.dropped == {HEAD: f"aligned ties it to {EMBED}"}
    assert fates(plan) == {EMBED: (EXTRAPOLATE, "")}


def test_a_tie_of_other_sizes_is_a_mismatch_that_rows_solves() -> None:
    sft, aligned = {EMBED: bf16(V, D)}, {EMBED: bf16(V + 2, D), HEAD: bf16(V + 2, D)}
    (problem,) = planned(sft, aligned).problems
    assert f"{HEAD}: sft BF16 [10, 4], aligned BF16 [12, 4]" in problem
    plan = planned(sft, aligned, on_mismatch="rows")
    plan.check()
    assert plan.noted[1] == (f"{HEAD}[0:10]", f"sft ties it to {EMBED}; sft has BF16 [10, 4]")


def test_a_tie_needs_the_same_width() -> None:
    assert pairs({EMBED: bf16(V, D)}, {EMBED: bf16(V, D), HEAD: bf16(V, D + 1)}).only_in_aligned == [HEAD]
    assert pairs({EMBED: bf16(V, D)}, {EMBED: bf16(V, D), HEAD: bf16(V)}).only_in_aligned == [HEAD]
    assert pairs({EMBED: bf16(V, D), HEAD: bf16(V, 2 * D)}, {EMBED: bf16(V, D)}).only_in_sft == [HEAD]


@pytest.mark.parametrize(
    "extra",
    [
        "qformer.embeddings.word_embeddings.weight", "model.decoder.embed_tokens.weight",
        "talker.model.embed_tokens.weight",
    ],
)  # fmt: skip
def test_a_head_with_two_embeddings_to_choose_from_stays_unpaired(extra: str) -> None:
    assert pairs(named(EMBED, extra), named(EMBED, extra, HEAD)).only_in_aligned == [HEAD]
    assert pairs(named(EMBED, extra, HEAD), named(EMBED, extra)).only_in_sft == [HEAD]


def test_a_second_head_is_no_tie() -> None:
    matched = pairs(named(EMBED, HEAD), named(EMBED, HEAD, "draft.lm_head.weight"))
    assert matched.only_in_aligned == ["draft.lm_head.weight"]


T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
BART = tuple(f"model.{name}" for name in T5)


@pytest.mark.parametrize("names", [T5, BART], ids=["T5", "BART"])
@pytest.mark.parametrize("config", [{}, UNTIED], ids=str)
def test_an_encoder_and_a_decoder_share_their_embedding_even_with_another_head(
    names: tuple[str, ...], config: dict[str, Any]
) -> None:
    shared = names[0]
    matched = pairs(named(shared), named(*names), config, config)
    assert counterparts(matched) == dict.fromkeys(names, shared)
    matched = pairs(named(*names), named(shared), config, config)
    assert matched.dropped == dict.fromkeys(names[1:], f"aligned ties it to {shared}")
    matched = pairs(named(shared), named(*names[1:]), config, config)
    assert counterparts(matched) == dict.fromkeys(names[1:], shared)
    assert (matched.only_in_sft, matched.dropped) == ([], {}), "the shared embedding is read"


def test_t5_with_and_without_its_head() -> None:
    config = {"tie_word_embeddings": True}
    assert counterparts(pairs(named(*T5), named(*T5, HEAD), config, config))[HEAD] == "shared.weight"
    assert pairs(named(*T5), named(*T5, HEAD), UNTIED, UNTIED).only_in_aligned == [HEAD], "T5 v1.1"


def test_two_embeddings_are_no_counterpart_of_a_shared_one() -> None:
    matched = pairs(named(*T5[1:]), named("shared.weight"))
    assert matched.only_in_aligned == ["shared.weight"]
    assert matched.dropped == dict.fromkeys(T5[1:], "aligned ties it to shared.weight")


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.output.weight", "bert.encoder.layer.0.output.weight", "attention.output.weight",
        "encoder.output.weight", "layers.3.output.weight", "model.layers.0.lm_head.weight", "pooler.output.weight",
        "model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight", "mtp.embed_tokens.weight",
        "model.layers.0.mlp.shared.weight", "moe.shared.weight", "vision_tower.embeddings.position_embedding.weight",
        "my_lm_head.weight", "lm_head.bias", "lm_head.weight.x", "lm_head_weight", "output.bias", "outputs.weight",
        "cls.predictions.transform.dense.weight", "score.weight", "v_head.summary.weight",
        "transformer.word_embeddings_layernorm.weight", "transformer.wpe.weight", "rwte.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [V, D])
def test_a_name_that_only_looks_like_a_head_or_an_embedding_is_never_tied(name: str, rows: int) -> None:
    extra = {name: bf16(rows, D)}
    assert pairs(named(EMBED), {**named(EMBED), **extra}).only_in_aligned == [name]
    assert pairs({**named(EMBED), **extra}, named(EMBED)).only_in_sft == [name]
    plan = planned(named(EMBED), {**named(EMBED), **extra}, on_unpaired="aligned", on_mismatch="rows")
    plan.check()
    assert fates(plan)[name] == (COPY, "not in sft")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (HEAD, True), (EMBED, True), ("output.weight", True), ("model.tok_embeddings.weight", True),
        ("bert.embeddings.word_embeddings.weight", True), ("shared.weight", True), ("thinker.lm_head.weight", True),
        ("model.layers.0.attention.output.weight", False), ("model.norm.weight", False), ("lm_head.bias", False),
    ],
)  # fmt: skip
def test_is_embedding(name: str, expected: bool) -> None:
    assert is_embedding(name) is expected


# Buffers.

ROTARY = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,)), "rotary_emb.cos_cached": ("F32", (8, 2))}
MASKS = {
    "transformer.h.0.attn.bias": ("BOOL", (1, 1, 8, 8)), "transformer.h.0.attn.masked_bias": ("F32", ()),
    "h.0.attn.bias": ("F32", (1, 1, 8, 8)), "gpt_neox.layers.0.attention.bias": ("U8", (1, 1, 8, 8)),
    "gpt_neox.layers.0.attention.masked_bias": ("F16", ()), "h.0.attn.attention.bias": ("F32", (1, 1, 4, 4)),
    "transformer.h.0.crossattention.bias": ("U8", (1, 1, 8, 8)), "h.1.crossattention.masked_bias": ("F32", ()),
    "transformer.rotary_pos_emb.inv_freq": ("BF16", (2,)), "bert.embeddings.position_ids": ("I64", (1, 8)),
    "vision_tower.vision_model.embeddings.position_ids": ("I64", (1, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*ROTARY, *MASKS])
@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_buffer_is_kept_or_dropped_and_needs_no_counterpart(name: str, dtype: str | None) -> None:
    shapes = {**ROTARY, **MASKS}[name]
    weights, old = named("w"), {**named("w"), name: shapes}
    plan = planned(weights, old, dtype=dtype)
    plan.check()
    assert fates(plan)[name] == (COPY, BUFFER)
    assert {step.name: step.dtype for step in plan.steps}[name] == shapes[0], "a buffer keeps its dtype"
    plan = planned(old, weights, dtype=dtype)
    plan.check()
    assert plan.dropped == {name: DROPPED_BUFFER}
    plan = planned({**old, name: ("F32", (1, 1, 2, 2))}, old, dtype=dtype)
    plan.check()
    assert fates(plan)[name] == (COPY, BUFFER), "sft's buffer does not count"
    assert plan.dropped == {}


def test_a_buffer_is_not_renamed() -> None:
    sft, aligned = {"rotary_emb.inv_freq": ("F32", (2,))}, {"model.rotary_emb.inv_freq": ("F32", (2,))}
    matched = pairs(sft, aligned)
    assert (list(matched.kept), list(matched.dropped)) == (list(aligned), list(sft))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.attn.c_attn.bias", (12,)), ("h.0.attn.bias", (8,)), ("h.0.attention.bias", (8, 8)),
        ("h.0.attn.bias", (1, 12, 8, 8)), ("h.0.attn.bias", (1, 1, 8, 4)), ("h.0.attention.bias", (1, 1, 8)),
        ("gpt_neox.layers.0.attention.dense.bias", (8,)), ("decoder.block.0.relative_attention_bias.weight", (8, 2)),
        ("bert.embeddings.position_embeddings.weight", (8, 4)), ("rotary_emb.inv_freq.weight", (8,)),
        ("model.layers.0.self_attn.q_proj.bias", (8,)), ("my_rotary_emb.inv_freq", (8,)), ("inv_freq", (8,)),
    ],
)  # fmt: skip
def test_a_tensor_that_only_looks_like_a_buffer_is_extrapolated(name: str, shape: tuple[int, ...]) -> None:
    weights = {name: bf16(*shape)}
    plan = planned(weights, weights)
    plan.check()
    assert fates(plan) == {name: (EXTRAPOLATE, "")}
    assert len(planned({**weights, "w": bf16(1)}, {"w": bf16(1)}).problems) == 1, "an unpaired one is a problem"


@pytest.mark.parametrize("mask", ["sft", "aligned"])
def test_a_mask_on_one_side_and_a_bias_of_the_same_name_on_the_other_are_a_mismatch(mask: str) -> None:
    shapes = {role: {"h.0.attn.bias": bf16(*((1, 1, 8, 8) if role == mask else (8,)))} for role in ("sft", "aligned")}
    plan = planned(shapes["sft"], shapes["aligned"])
    assert plan.dropped == {}
    (problem,) = plan.problems
    assert "whose counterpart has another shape" in problem
