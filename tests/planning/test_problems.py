"""Tests of the problems: a user who follows the advice of a message gets the right model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet, read_folder, safetensors_bytes
from plans import ALPHA, Shapes, checkpoint, make_plan
from tiny_models import LOAD, loaded, pair_of

import expo
from expo.fast import main
from expo.planning.matching import MOST_LINES

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = "model.layers.{0}.mlp.experts.{1}"


def assert_same(folder: Path, expected: Path) -> None:
    """Assert that two outputs are equal as bf16: transformers saves some routers that it has loaded in fp32."""
    one, other = (loaded(path).state_dict() for path in (folder, expected))
    assert one.keys() == other.keys()
    assert not [name for name, tensor in other.items() if not torch.equal(one[name].bfloat16(), tensor.bfloat16())]


def refuse_merge(sft: Path, aligned: Path, out: Path, **options: Any) -> str:
    """Return the message with which a merge is refused."""
    with pytest.raises(expo.PlanError) as caught:
        expo.merge(sft, aligned, 0.3, out, **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= MOST_LINES
    return text


# Experts.

MIXTURES: dict[str, Callable[[], Any]] = {
    "Qwen 3 MoE": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                                    decoder_sparse_step=1)),
    "Mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "DeepSeek V3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**SMALL, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                      first_k_dense_replace=0, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
                                      qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("fused", ["sft", "aligned"])
def test_fused_experts_are_named_and_the_advice_is_right(family: str, fused: str, tmp_path: Path) -> None:
    """Without a config nothing says which model it is; with one, the merge pairs the experts itself."""
    torch.manual_seed(0)
    folders = dict(zip(("sft", "aligned"), pair_of(MIXTURES[family](), tmp_path), strict=True))
    expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "expected")
    with quiet():
        model = LOAD(folders[fused], dtype="auto")
    raw = tmp_path / "raw"
    shutil.copytree(folders[fused], raw, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), raw / "pytorch_model.bin")  # as FSDP and zero_to_fp32.py save it
    given = {**folders, fused: raw}
    expo.merge(given["sft"], given["aligned"], 0.3, tmp_path / "paired")
    assert_same(tmp_path / "paired", tmp_path / "expected")
    bare = {role: tmp_path / "bare" / role for role in given}
    for role, folder in given.items():
        shutil.copytree(folder, bare[role], ignore=shutil.ignore_patterns("*.json"))
    text = refuse_merge(bare["sft"], bare["aligned"], tmp_path / "out")
    assert "experts" in text.splitlines()[0]
    assert "on_unpaired" not in text
    apart = "aligned" if fused == "sft" else "sft"
    with quiet():
        LOAD(given[apart], dtype="auto").save_pretrained(tmp_path / "again", save_original_format=False)
    given[apart] = tmp_path / "again"
    expo.merge(given["sft"], given["aligned"], 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_a_thousand_experts_are_a_few_lines() -> None:
    one: Shapes = {f"{EXPERTS.format(layer, expert)}.{kind}.weight": ("BF16", (2, 4))
                   for layer in range(8) for expert in range(128) for kind in ("up_proj", "gate_proj")}  # fmt: skip
    all_: Shapes = {EXPERTS.format(layer, "gate_up_proj"): ("BF16", (128, 4, 4)) for layer in range(8)}
    norm: Shapes = {"model.norm.weight": ("BF16", (4,))}
    (problem,) = make_plan(checkpoint({**norm, **one}, "/models/sft"), checkpoint({**norm, **all_}), [ALPHA]).problems
    assert problem.splitlines()[1:] == [
        "  model.layers.*.mlp.experts.gate_up_proj (aligned only): 8 tensors",
        "  model.layers.*.mlp.experts.*.up_proj.weight (sft only): 1024 tensors",
        "  model.layers.*.mlp.experts.*.gate_proj.weight (sft only): 1024 tensors",
    ]


def test_an_option_that_copies_most_of_the_model_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sft, aligned = pair_of(MIXTURES["Qwen 3 MoE"](), tmp_path)
    with quiet():
        torch.save(LOAD(aligned, dtype="auto").state_dict(), aligned / "pytorch_model.bin")
    (aligned / "model.safetensors").unlink()
    arguments = ["--sft", str(sft), "--aligned", str(aligned), "--alpha", "0.3", "--on-unpaired", "aligned"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "of the floating-point bytes are copied from aligned and not extrapolated" not in shown
    small = {name: tensor for name, tensor in read_folder(sft).items() if "experts" in name or "norm" in name}
    (sft / "model.safetensors").write_bytes(safetensors_bytes(small))
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "of the floating-point bytes are copied from aligned and not extrapolated" in capsys.readouterr().err


def test_live_warns_of_an_option_that_copies_most_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sft, aligned = pair_of(MIXTURES["Qwen 3 MoE"](), tmp_path)
    small = {name: tensor for name, tensor in read_folder(sft).items() if "experts" in name or "norm" in name}
    (sft / "model.safetensors").write_bytes(safetensors_bytes(small))
    with quiet():
        model = LOAD(aligned, dtype="auto")
    with pytest.warns(UserWarning, match="of the floating-point bytes are copied from aligned"):
        expo.Live(model, sft, on_unpaired="aligned").close()


# Names, heads and parts.


def test_the_same_tensors_under_other_names_are_not_offered_the_option() -> None:
    body: Shapes = {"norm.weight": ("BF16", (4,))}
    in_aligned: Shapes = {f"blocks.{i}.attention.query.weight": ("BF16", (4, 4)) for i in range(3)}
    in_sft: Shapes = {f"layers.{i}.attn.q.weight": ("BF16", (4, 4)) for i in range(3)}
    (problem,) = make_plan(
        checkpoint({**body, **in_sft}, "/models/sft"), checkpoint({**body, **in_aligned}), [ALPHA]
    ).problems
    assert "the same tensors under other names" in problem
    assert "on_unpaired" not in problem


LAYERS = range(3)
FORMS: dict[str, tuple[Shapes, Shapes]] = {
    "attention in one matrix": (
        {f"model.layers.{i}.self_attn.{one}_proj.weight": ("BF16", (4, 4)) for i in LAYERS for one in "qkv"},
        {f"model.layers.{i}.self_attn.qkv_proj.weight": ("BF16", (12, 4)) for i in LAYERS},
    ),
    "attention in one matrix of another module": (
        {f"layers.{i}.self_attn.{one}_proj.weight": ("BF16", (4, 4)) for i in LAYERS for one in "qkv"},
        {f"encoder.layers.{i}.attn.Wqkv.weight": ("BF16", (12, 4)) for i in LAYERS},
    ),
    "a head under another name": ({"lm_head.weight": ("BF16", (9, 4))}, {"head.weight": ("BF16", (9, 4))}),
    "Meta's names": (
        {"lm_head.weight": ("BF16", (9, 4)), "model.layers.0.mlp.up_proj.weight": ("BF16", (8, 4))},
        {"output.weight": ("BF16", (9, 4)), "layers.0.feed_forward.w3.weight": ("BF16", (8, 4))},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_another_form_of_the_same_tensors_is_not_offered_the_option(form: str, turned: bool) -> None:
    body: Shapes = {"model.norm.weight": ("BF16", (4,))}
    one, other = reversed(FORMS[form]) if turned else FORMS[form]
    sft, aligned = checkpoint({**body, **one}, "/models/sft"), checkpoint({**body, **other})
    (problem,) = make_plan(sft, aligned, [ALPHA]).problems
    assert "under other names or in another form: if transformers loads both and reports no missing weights" in problem
    assert "on_unpaired" not in problem
    assert "tie_word_embeddings" not in problem


def test_layers_that_aligned_lacks_are_not_offered_the_option() -> None:
    layers: Shapes = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (4, 4)) for i in LAYERS}
    fewer = {name: layers[name] for name in list(layers)[:-1]}
    (problem,) = make_plan(checkpoint(layers, "/models/sft"), checkpoint(fewer), [ALPHA]).problems
    assert "aligned lacks layers that sft has" in problem
    assert "on_unpaired" not in problem


def test_a_layer_that_the_config_does_not_count_is_offered_the_option() -> None:
    layers: Shapes = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (4, 4)) for i in LAYERS}
    fewer = {name: layers[name] for name in list(layers)[:-1]}
    aligned = checkpoint(fewer, config={"num_hidden_layers": len(fewer)})
    (problem,) = make_plan(checkpoint(layers, "/models/sft"), aligned, [ALPHA]).problems
    assert "`on_unpaired='aligned'` keeps aligned's tensors and drops sft's" in problem


@pytest.mark.parametrize("alone", ["sft", "aligned"])
def test_parts_of_one_checkpoint_are_offered_the_option_and_it_is_right(alone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    folders = dict(zip(("sft", "aligned"), pair_of(model, tmp_path), strict=True))
    expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "expected")
    file = folders[alone] / "model.safetensors"
    extra = ("BF16", (1, 32), bytes(range(64)))
    file.write_bytes(safetensors_bytes({**read_folder(folders[alone]), "v_head.summary.weight": extra}))
    text = refuse_merge(folders["sft"], folders["aligned"], tmp_path / "out")
    assert "`on_unpaired='aligned'` keeps aligned's tensors and drops sft's" in text
    expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "out", on_unpaired="aligned")
    out = read_folder(tmp_path / "out")
    assert out.pop("v_head.summary.weight", None) == (extra if alone == "aligned" else None)
    assert out == read_folder(tmp_path / "expected")


def llama(folder: Path, tied: bool) -> tuple[Path, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    return pair_of(transformers.LlamaForCausalLM(config), folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("side", ["sft", "aligned"])
def test_a_head_that_is_missing_though_nothing_says_that_it_is_tied(side: str, tmp_path: Path) -> None:
    folders = dict(zip(("sft", "aligned"), llama(tmp_path, True), strict=True))
    expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "expected")
    edit_config(folders[side], tie_word_embeddings=False)  # the config is wrong: the head is the embedding
    other = folders["aligned" if side == "sft" else "sft"]
    tensors = read_folder(other)
    with_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    (other / "model.safetensors").write_bytes(safetensors_bytes(with_head))
    text = refuse_merge(folders["sft"], folders["aligned"], tmp_path / "out")
    assert "on_unpaired" not in text
    assert f'{side} {folders[side]} has no head: if the model uses its embedding as its head, write "tie_word' in text
    edit_config(folders[side], tie_word_embeddings=True)
    expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_a_tied_aligned_over_an_sft_with_a_head_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "apart").mkdir()
    sft = llama(tmp_path / "apart", False)[0]
    aligned = llama(tmp_path, True)[1]
    text = refuse_merge(sft, aligned, tmp_path / "out")
    assert "aligned ties its head to its embedding and sft has a head of its own" in text
    assert "on_unpaired" not in text
    with quiet():
        model = LOAD(aligned, dtype="auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "advised")
    expo.merge(sft, tmp_path / "advised", 0.3, tmp_path / "out")
    output, start = loaded(tmp_path / "out").state_dict(), loaded(sft).state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(output[name], expo.extrapolate(start[name], before[name], 0.3)), name


def test_a_checkpoint_that_lacks_its_embedding() -> None:
    shapes: Shapes = {"lm_head.weight": ("BF16", (9, 4)), "model.norm.weight": ("BF16", (4,))}
    whole: Shapes = {**shapes, "model.embed_tokens.weight": ("BF16", (9, 4))}
    config = {"tie_word_embeddings": False}
    sft, aligned = checkpoint(whole, "/models/sft", config=config), checkpoint(shapes, config=config)
    (problem,) = make_plan(sft, aligned, [ALPHA]).problems
    assert "aligned /models/aligned lacks an embedding: download or save the checkpoint again" in problem
    assert "`on_unpaired" not in problem


def test_a_classifier_over_a_model_with_a_head_is_offered_the_option() -> None:
    body: Shapes = {"model.norm.weight": ("BF16", (4,)), "model.embed_tokens.weight": ("BF16", (9, 4))}
    sft = checkpoint(
        {**body, "lm_head.weight": ("BF16", (9, 4))}, "/models/sft", config={"architectures": ["XForCausalLM"]}
    )
    aligned = checkpoint(
        {**body, "score.weight": ("BF16", (1, 4))}, config={"architectures": ["XForSequenceClassification"]}
    )
    (problem,) = make_plan(sft, aligned, [ALPHA]).problems
    assert "`on_unpaired='aligned'` keeps aligned's tensors and drops sft's" in problem


# Empty tensors.


@pytest.mark.parametrize("hollow", [("sft",), ("aligned",), ("sft", "aligned")], ids=str)
@pytest.mark.parametrize("options", [{}, {"on_mismatch": "aligned", "on_unpaired": "aligned"}], ids=str)
@pytest.mark.parametrize("some", [False, True])
def test_weights_that_were_not_gathered_are_refused(
    hollow: tuple[str, ...], options: dict[str, Any], some: bool, tmp_path: Path
) -> None:
    for name, folder in zip(("sft", "aligned"), llama(tmp_path, False), strict=True):
        if name in hollow:
            tensors = {key: (dtype, (0,), b"") if not some or "mlp" in key else (dtype, shape, data)
                       for key, (dtype, shape, data) in read_folder(folder).items()}  # fmt: skip
            (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    text = refuse_merge(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", **options)
    assert "DeepSpeed ZeRO-3 and FSDP leave empty ones unless the weights are gathered before saving" in text
    assert [line.split()[0] for line in text.splitlines()] == list(hollow)
    assert "--on" not in text
    with pytest.raises(expo.PlanError, match="gathered"):
        expo.stream(tmp_path / "sft", tmp_path / "aligned", 0.3, framework="numpy", **options)


def test_live_refuses_empty_weights_too(tmp_path: Path) -> None:
    sft, aligned = llama(tmp_path, False)
    tensors = {name: (dtype, (0,), b"") for name, (dtype, _, _) in read_folder(sft).items()}
    (sft / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(expo.PlanError, match="gathered"):
        expo.Live(LOAD(aligned, dtype="auto"), sft)


def test_an_empty_tensor_that_is_no_weight_may_be() -> None:
    shapes: Shapes = {"norm.weight": ("BF16", (4,)), "table": ("BF16", (0, 4)), "ids": ("I64", (0,))}
    make_plan(checkpoint(shapes, "/models/sft"), checkpoint(shapes), [ALPHA]).check()


def test_a_refusal_has_at_most_forty_lines() -> None:
    names = [f"{letter}{other}.x" for letter in "abcdefgh" for other in "abcdefgh"]
    sft: Shapes = {**dict.fromkeys(names, ("BF16", (4,))), "kept": ("BF16", (999,))}
    plan = make_plan(checkpoint(sft, "/models/sft"), checkpoint({"kept": ("BF16", (999,))}), [ALPHA],
                     {f"no such {i}": 0 for i in range(60)})  # fmt: skip
    with pytest.raises(expo.PlanError) as caught:
        plan.check()
    lines = str(caught.value).splitlines()
    assert len(lines) == MOST_LINES
    assert lines[-1] == "and 33 more lines; python -m expo.fast --plan --json lists them all"
    assert sum(len(problem.splitlines()) for problem in plan.problems) == 72
