"""The model that a search judges has the weights that the merge writes, bit for bit, or the search is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from searches import PROMPTS, score
from tiny_checkpoints import Weights, load, make_deepseek, make_llama, make_qwen, save_random

import expo
from expo.inputs.resolve import open_inputs
from expo.options import MergeOptions
from expo.planning.matching import match_tensors
from expo.search import check_merge, judged_model, search_alpha
from expo.search.judged_model import open_judged_model
from expo.search.merge_check import weight_digests
from expo.search.settings import SearchOptions
from expo.tensors.originals import KEEP


def options(keep: str = "device", on_unpaired: str = "error", on_mismatch: str = "error") -> SearchOptions:
    return SearchOptions(2, 0, "cpu", keep, 3, on_unpaired, on_mismatch, False, False, True)


def assert_judged_is_merged(sft: Path, aligned: Path, how: SearchOptions, folder: Path) -> str:
    """Assert that both have the same bits in every weight at several alphas; return the note for the user."""
    policies: Any = {"on_unpaired": how.on_unpaired, "on_mismatch": how.on_mismatch}
    model = load(aligned)
    before = weight_digests(model)
    with open_inputs(sft, aligned) as (sft_input, aligned_input):
        matched = match_tensors(sft_input, aligned_input, MergeOptions(**policies))
        judged, note = open_judged_model(model, sft_input, aligned_input, matched, how)
    for alpha in (0.3, -1.5, 0.0):
        judged.alpha = alpha
        expo.merge(sft, aligned, alpha, folder / str(alpha), **policies)
        expected = load(folder / str(alpha)).state_dict()
        judged_weights = model.state_dict()
        assert judged_weights.keys() == expected.keys()
        wrong = [name for name in expected if not torch.equal(bits(judged_weights[name]), bits(expected[name]))]
        assert not wrong, (alpha, wrong)
        check_merge(folder / str(alpha), weight_digests(model))
        assert (weight_digests(model) == before) is (alpha == 0)
    judged.close()
    assert weight_digests(model) == before
    return note


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("on_unpaired", ["error", "aligned"])
def test_fused_experts_are_judged_as_they_are_merged(
    mixture: tuple[Path, Path], keep: str, on_unpaired: str, tmp_path: Path
) -> None:
    names = set(dict(load(mixture[1]).named_parameters()))
    assert not names <= set(load_file(mixture[1] / "model.safetensors")), (
        "this version of transformers fuses no experts, so the test needs another model"
    )
    note = assert_judged_is_merged(*mixture, options(keep, on_unpaired), tmp_path)
    assert "sft is loaded as a model too" in note


def test_a_model_whose_names_are_those_of_its_files_takes_no_second_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, aligned = save_random(tmp_path / "sft", make_llama(), 1), save_random(tmp_path / "aligned", make_llama(), 2)
    monkeypatch.setattr(judged_model, "load_model", None)
    with pytest.raises(TypeError):
        assert_judged_is_merged(
            *(save_random(tmp_path / str(n), make_qwen(), n) for n in (3, 4)), options(), tmp_path / "fused"
        )
    monkeypatch.undo()
    assert assert_judged_is_merged(sft, aligned, options(), tmp_path / "out") == ""


def bf16_router(weights: Weights) -> None:
    """Store the router in bf16, as the published files do."""
    for name in weights:
        weights[name] = weights[name].bfloat16() if name.endswith("gate.weight") else weights[name]


def extra_layer(weights: Weights) -> None:
    """Add a layer that predicts one more token, as some files have it; transformers does not load it."""
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        weights[name.replace("layers.1.", "layers.2.")] = weights[name] + 1


def test_a_weight_that_the_library_widens_is_rounded_as_the_merge_rounds_it(tmp_path: Path) -> None:
    sft = save_random(tmp_path / "sft", make_deepseek(), 1, bf16_router)
    aligned = save_random(tmp_path / "aligned", make_deepseek(), 2, bf16_router)
    assert load(aligned).model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert_judged_is_merged(sft, aligned, options(), tmp_path)


@pytest.mark.parametrize("make", [make_llama, make_deepseek])
def test_tensors_of_the_files_that_the_model_does_not_use_are_allowed(make: Any, tmp_path: Path) -> None:
    sft, aligned = (save_random(tmp_path / str(seed), make(), seed, extra_layer) for seed in (1, 2))
    assert_judged_is_merged(sft, aligned, options(), tmp_path / "out")


def test_resized_vocabularies_and_ties_beside_fused_experts(tmp_path: Path) -> None:
    sft = save_random(tmp_path / "sft", make_qwen(tied=True), 1)
    aligned = save_random(tmp_path / "aligned", make_qwen(vocabulary=1540, tied=True), 2)
    assert_judged_is_merged(sft, aligned, options(on_mismatch="rows"), tmp_path / "rows")
    assert_judged_is_merged(sft, aligned, options(on_mismatch="aligned"), tmp_path / "aligned-out")
    untied = save_random(tmp_path / "untied", make_qwen(), 3)
    assert_judged_is_merged(sft, untied, options(), tmp_path / "untied-out")


def fp32_weights(weights: Weights) -> None:
    """Store the weights in fp32, under a config that says bf16."""
    weights.update({name: tensor.float() * 1.001 for name, tensor in weights.items()})


def search(sft: Path, aligned: Path, out: Path, alphas: Any = (0.5,), **more: Any) -> Any:
    return search_alpha(sft, aligned, PROMPTS[:2], score, alphas, out, max_new_tokens=4, device="cpu", **more)


def test_what_cannot_be_judged_as_it_is_merged_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    sft = save_random(tmp_path / "sft", make_llama(), 1)
    aligned = save_random(tmp_path / "aligned", make_llama(), 2, fp32_weights)
    with pytest.raises(expo.PlanError) as caught:
        search(sft, aligned, tmp_path / "search")
    text = str(caught.value)
    assert text.startswith("the model that would be judged is not the one that the merge writes: 21 weights, 100.0% of")
    assert "model.embed_tokens.weight: aligned is F32 in the files and BF16 in memory" in text
    assert "and 1 more" in text
    assert len(text.splitlines()) <= 40
    assert (tmp_path / "search" / "replies.jsonl").read_bytes() == b"", "before anything is sampled"
    assert "with that folder as `aligned`, `alphas=[0]` and an `out` of its own" in text
    expo.merge(sft, aligned, 0.5, tmp_path / "merged")
    assert search(sft, tmp_path / "merged", tmp_path / "advice", [0.0]).best == 0
    lines = [json.loads(line) for line in (tmp_path / "advice" / "replies.jsonl").read_text().splitlines()]
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS[:2])


def without_an_expert(weights: Weights) -> None:
    for name in [name for name in weights if "layers.1.mlp.experts.3." in name]:
        del weights[name]


def test_an_expert_that_sft_lacks_is_merged_as_aligned_has_it_and_not_judged_otherwise(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    sft = save_random(tmp_path / "sft", make_qwen(), 1, without_an_expert)
    with pytest.raises(expo.PlanError, match=r"layers\.1\.mlp\.experts\.(gate_up|down)_proj: no tensor of al"):
        search(sft, mixture[1], tmp_path / "search", on_unpaired="aligned")


def fused_experts(weights: Weights) -> None:
    """Store the experts in one tensor, as memory has them, and as files may have them too."""
    for layer in range(2):
        parts = {kind: [weights.pop(f"model.layers.{layer}.mlp.experts.{number}.{kind}_proj.weight")
                        for number in range(4)] for kind in ("gate", "up", "down")}  # fmt: skip
        both = [torch.cat(each) for each in zip(parts["gate"], parts["up"], strict=True)]
        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts["down"])


def test_experts_that_are_fused_on_one_side_or_both(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    sft = save_random(tmp_path / "sft", make_qwen(), 1, fused_experts)
    assert_judged_is_merged(sft, mixture[1], options(), tmp_path / "one")
    aligned = save_random(tmp_path / "aligned", make_qwen(), 2, fused_experts)
    assert_judged_is_merged(sft, aligned, options(), tmp_path / "out")


def test_an_sft_without_a_config_is_no_model_and_the_refusal_says_so(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copyfile(mixture[0] / "model.safetensors", tmp_path / "sft.safetensors")
    with pytest.raises(expo.PlanError, match=r"sft cannot be loaded as a model, which might help: .*sft\.safetensors"):
        search(tmp_path / "sft.safetensors", mixture[1], tmp_path / "search")


def test_an_sft_that_does_not_fit_a_gpu_may_be_loaded_on_the_cpu(
    mixture: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def full(_: Any, path: str, device: torch.device, *rest: Any) -> Any:
        places.append(device.type)
        raise expo.EngineError(f"{path} does not fit into the memory of {device}: try `device='cpu'`")

    monkeypatch.setattr(judged_model, "load_model", full)
    model: Any = load(mixture[1])
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with open_inputs(*mixture) as (sft_input, aligned_input):
        matched = match_tensors(sft_input, aligned_input, MergeOptions())
        for keep in KEEP:
            with pytest.raises(expo.EngineError, match="try `device='cpu'`; or `keep='host'` or `keep='disk'`, with"):
                open_judged_model(model, sft_input, aligned_input, matched, options(keep))
    assert places == ["cuda", "cpu", "cpu"]


def test_a_square_matrix_that_the_library_transposes_is_not_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, aligned = save_random(tmp_path / "sft", make_llama(), 1), save_random(tmp_path / "aligned", make_llama(), 2)
    model = load(aligned)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t().contiguous()

    def no(*_: Any) -> Any:
        raise expo.CheckpointError("not now")

    monkeypatch.setattr(judged_model, "load_model", no)
    with open_inputs(sft, aligned) as (sft_input, aligned_input):
        matched = match_tensors(sft_input, aligned_input, MergeOptions())
        with pytest.raises(
            expo.PlanError, match=r"1 weights, .* differ:\n  model\.layers\.0\.self_attn\.q_proj\.weight"
        ):
            open_judged_model(model, sft_input, aligned_input, matched, options())


def test_live_names_the_way_out_where_names_differ(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    """A library may have fused experts whose names in the files are not in the table of layouts."""
    model = load(mixture[1])
    shutil.copytree(mixture[0], tmp_path / "sft")
    for file in (tmp_path / "sft").glob("*.safetensors"):
        renamed = {name.replace(".experts.", ".parts."): tensor for name, tensor in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    for index in (tmp_path / "sft").glob("*.index.json"):
        index.write_text(index.read_text().replace(".experts.", ".parts."))
    with pytest.raises(
        expo.PlanError,
        match=r"^the names of the model's tensors are not those of sft's files; .* load sft with the same library",
    ):
        expo.Live(model, tmp_path / "sft")
    expo.Live(model, load(mixture[0])).close()
