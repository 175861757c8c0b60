"""Checkpoints saved inside a wrapper: their names pair, and an output has the names that its model loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet, read_folder, safetensors_bytes
from plans import ALPHA, Shapes, checkpoint, make_plan
from tiny_models import LOAD, loaded, pair_of

import expo
from expo.checkpoints.wrappers import remove_wrapper
from expo.fast import main

WRAPPERS = [
    "_orig_mod.", "module.", "base_model.model.", "module.module.", "_forward_module.", "_fsdp_wrapped_module.",
    "pretrained_model.", "policy.", "actor.", "_orig_mod.base_model.model.", "module._orig_mod.", "model.",
    "module.model.",
]  # fmt: skip
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return sft, aligned and their merge with alpha 0.3, all under the model's own names."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    sft, aligned = pair_of(transformers.LlamaForCausalLM(CONFIG), folder)
    expo.merge(sft, aligned, 0.3, folder / "merged")
    return sft, aligned, folder / "merged"


def renamed(folder: Path, to: Path, prefix: str, bin_file: bool = False) -> Path:
    """Copy a checkpoint, with a prefix before each name."""
    ignored = shutil.ignore_patterns("model.safetensors")
    shutil.copytree(folder, to, ignore=ignored)
    tensors = read_folder(folder)
    if bin_file:
        state = LOAD(folder, dtype="auto").state_dict()
        torch.save({prefix + name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
                    for name, tensor in state.items()}, to / "pytorch_model.bin")  # fmt: skip
    else:
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        (to / "model.safetensors").write_bytes(safetensors_bytes(named))
    return to


def assert_same(folder: Path, merged: Path) -> None:
    ours, wanted = loaded(folder).state_dict(), loaded(merged).state_dict()
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("wrapped", ["sft", "aligned", "both"])
def test_the_output_loads_and_is_the_same(
    prefix: str, wrapped: str, plain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    sft, aligned, merged = plain
    if wrapped != "aligned":
        sft = renamed(sft, tmp_path / "sft", prefix)
    if wrapped != "sft":
        aligned = renamed(aligned, tmp_path / "aligned", prefix)
    result = expo.merge(sft, aligned, 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", merged)
    assert [f"'{prefix}" in warning for warning in result.warnings] == [True] * (wrapped != "sft")


@pytest.mark.parametrize("wrapped", ["aligned", "both"])
@pytest.mark.parametrize("prefix", ["base_model.", "base_model.model."])
def test_two_wrappers_whose_names_look_alike(wrapped: str, prefix: str, tmp_path: Path) -> None:
    """Without a head, `base_model.model.layers` may come from either wrapper; the model's names begin with `model.`."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True}))
    given = dict(zip(("sft", "aligned"), pair_of(model, tmp_path), strict=True))
    expo.merge(given["sft"], given["aligned"], 0.3, tmp_path / "merged")
    for name in ("sft", "aligned") if wrapped == "both" else ("aligned",):
        given[name] = renamed(given[name], tmp_path / f"wrapped-{name}", prefix)
    expo.merge(given["sft"], given["aligned"], 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "merged")


def test_a_bin_file_inside_a_wrapper(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sft, aligned, merged = plain
    sft = renamed(sft, tmp_path / "sft", "module.", bin_file=True)
    aligned = renamed(aligned, tmp_path / "aligned", "_orig_mod.", bin_file=True)
    expo.merge(sft, aligned, 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", merged)


def test_plan_summary_and_stream_say_so(
    plain: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, aligned, merged = plain
    aligned = renamed(aligned, tmp_path / "aligned", "module.")
    arguments = ["--sft", str(sft), "--aligned", str(aligned), "--alpha", "0.3", "--out", str(tmp_path / "out")]
    said = "its 'module.lm_head.weight' is 'lm_head.weight' in the output, and so on for 12 names"
    assert main([*arguments, "--plan"]) == 0
    assert said in capsys.readouterr().out
    assert main(arguments) == 0
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match="saved inside a wrapper"):
        names = {name for name, _ in expo.stream(sft, aligned, 0.3)}
    assert names == read_folder(merged).keys()


def test_live_over_a_wrapped_folder_and_over_a_compiled_model(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sft, aligned, merged = plain
    model = LOAD(aligned, dtype="auto")
    for one in (model, torch.compile(model, backend="eager")):
        with expo.Live(one, renamed(sft, tmp_path / f"{type(one).__name__}", "module.module.")) as live:
            live.alpha = 0.3
            for name, tensor in loaded(merged).state_dict().items():
                assert torch.equal(model.state_dict()[name], tensor), name


def test_shards_and_an_adapter_over_a_wrapped_base(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sft = plain[0]
    with quiet():
        model = peft.get_peft_model(LOAD(sft, dtype="auto"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "adapter")
    expo.merge(sft, tmp_path / "adapter", 0.3, tmp_path / "wanted")
    wrapped = renamed(sft, tmp_path / "wrapped", "module.")
    expo.merge(wrapped, tmp_path / "adapter", 0.3, tmp_path / "out", max_shard_size="8KB")
    assert_same(tmp_path / "out", tmp_path / "wanted")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_folder(sft).keys()


TRAINED: dict[str, Any] = {
    "GPT-2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0),
    "T5": transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=2),
    "BERT": transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                    num_attention_heads=2),
    "Mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
}  # fmt: skip
CLASSES = {"T5": transformers.AutoModelForSeq2SeqLM, "BERT": transformers.AutoModelForMaskedLM}


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("prefix", ["model.", "_forward_module.model.", "actor.model.", "module."])
def test_a_trainers_module_around_other_families(family: str, prefix: str, tmp_path: Path) -> None:
    """The names of these families do not begin with `model.`."""
    kind = CLASSES.get(family, transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    sft, aligned = pair_of(kind.from_config(TRAINED[family]), tmp_path)
    expo.merge(sft, aligned, 0.3, tmp_path / "wanted")
    merged = expo.merge(sft, renamed(aligned, tmp_path / "wrapped", prefix), 0.3, tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "wanted")
    assert prefix in merged.warnings[0]


@pytest.mark.parametrize("prefix", ["foo.", "net.student."])
def test_an_unknown_prefix_on_both_sides_is_a_warning(
    prefix: str, plain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    sft, aligned, _ = (renamed(folder, tmp_path / folder.name, prefix) for folder in plain)
    merged = expo.merge(sft, aligned, 0.3, tmp_path / "out")
    said = [warning for warning in merged.warnings if "if a wrapper around the model added that" in warning]
    (text,) = said
    assert text.startswith(f"all names of aligned begin with {prefix!r}, and so do the output's")
    with pytest.raises(expo.OutputError):
        expo.merge(sft, aligned, 0.3, tmp_path / "checked", check=True)


OWN: Shapes = {"policy.a.weight": ("BF16", (4,)), "policy.b.weight": ("BF16", (4,))}


@pytest.mark.parametrize(
    ("sft", "aligned", "config"),
    [
        pytest.param(OWN, OWN, {"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}, id="custom code's own names"),
        pytest.param(OWN, OWN, {}, id="a bare file's own names"),
        pytest.param({"layers.0.w": ("BF16", (4,)), "norm.w": ("BF16", (4,))},
                     {"model.layers.0.w": ("BF16", (4,)), "model.norm.w": ("BF16", (4,))}, {"model_type": "llama"},
                     id="sft without its head"),
        pytest.param({"policy.a.weight": ("BF16", (4,)), "value.a.weight": ("BF16", (4,))},
                     {"policy.a.weight": ("BF16", (4,)), "value.a.weight": ("BF16", (4,))}, {"model_type": "llama"},
                     id="one part of several"),
        pytest.param({"x.weight": ("BF16", (4,))}, {"module.x.weight": ("BF16", (4,)), "x.weight": ("BF16", (4,))}, {},
                     id="two names would be one"),
    ],
)  # fmt: skip
def test_names_that_are_the_models_own_stay(sft: Shapes, aligned: Shapes, config: dict[str, Any]) -> None:
    given = checkpoint(aligned, config=config)
    found = remove_wrapper(given, checkpoint(sft, "/models/sft", config=config))
    assert found.tensors == given.tensors
    assert ["'policy.', and so do the output's" in note for note in found.notes] == [True] * (aligned is OWN)


@pytest.mark.parametrize("side", ["sft", "aligned"])
def test_an_unknown_prefix_is_one_line(side: str, plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folders = dict(zip(("sft", "aligned"), plain, strict=False))
    folders[side] = renamed(folders[side], tmp_path / side, "student.net.")
    with pytest.raises(expo.PlanError) as caught:
        expo.merge(folders["sft"], folders["aligned"], 0.3, tmp_path / "out")
    assert f"all names of {side} {folders[side]} begin with 'student.net.'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "on_unpaired" not in str(caught.value)


def test_a_peft_models_whole_state_dict_is_named(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sft, aligned, merged = plain
    with quiet():
        model = peft.get_peft_model(LOAD(sft, dtype="auto"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    whole = tmp_path / "whole"
    shutil.copytree(sft, whole, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), whole / "pytorch_model.bin")
    with pytest.raises(expo.PlanError, match=r"PEFT model: call merge_and_unload\(\) on that model"):
        expo.merge(whole, aligned, 0.3, tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "advised")  # lora_B is zero, so the trained model is the base
    expo.merge(tmp_path / "advised", aligned, 0.3, tmp_path / "out")
    assert_same(tmp_path / "out", merged)


def test_a_rule_by_name_sees_the_outputs_names() -> None:
    from expo.checkpoints.checkpoint import Checkpoint

    config = {"model_type": "llama"}
    given: Checkpoint = checkpoint({"module.a": ("BF16", (4,)), "module.b": ("BF16", (4,))}, config=config)
    short = remove_wrapper(given, given)
    sft = checkpoint({"a": ("BF16", (4,)), "b": ("BF16", (4,))}, "/models/sft", config=config)
    plan = make_plan(sft, short, [ALPHA], {"^a$": 0})
    plan.check()
    assert [(step.name, any(step.alphas)) for step in plan.steps] == [("a", False), ("b", True)]
