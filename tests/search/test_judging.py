"""The model that a search judges is the one that the merge writes, weight for weight; and the merge is checked."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plans import make_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import expo
import expo.tensors.live
from expo.demo import ALIGNED
from expo.inputs.resolve import open_inputs
from expo.search import check_merge, judging, search_alpha
from expo.search import models as search_models
from expo.search.__main__ import main
from expo.search.judging import digests, open_judged
from expo.search.models import load_model
from expo.search.settings import Options
from expo.tensors.live import KEEP, saved

PROMPTS = ["Return the", "If the"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def quiet_library() -> Iterator[None]:
    log: Any = transformers.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    yield
    log.set_verbosity(before)
    log.enable_progress_bar()


def length(prompts: list[str], replies: list[str]) -> list[float]:
    return [float(len(reply)) for reply in replies]


def qwen(dtype: torch.dtype = torch.bfloat16, vocabulary: int = 1536, tied: bool = False) -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    make: Any = transformers.LlamaConfig
    config = make(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def deepseek() -> Any:
    """A mixture whose router is fp32 in memory whatever its files hold, with a bias that is a buffer."""
    config = transformers.DeepseekV3Config(
        vocab_size=1536, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=4, n_shared_experts=1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def written(folder: Path, model: Any, seed: int, edit: Callable[[Weights], None] | None = None) -> Path:
    """A checkpoint of this kind, every weight of it at random, and the demo's tokenizer."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in saved(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(folder)
    if edit is not None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def options(keep: str = "device", on_unpaired: str = "error", on_mismatch: str = "error") -> Options:
    return Options(2, 0, "cpu", keep, 3, on_unpaired, on_mismatch, False, False, True)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def judged_is_merged(sft: Path, aligned: Path, how: Options, folder: Path) -> str:
    """Assert that it is, at several alphas, in every weight and bit; the note for the user."""
    rules = {"on_unpaired": how.on_unpaired, "on_mismatch": how.on_mismatch}
    model = loaded(aligned)
    before = digests(model)
    with open_inputs(sft, aligned) as (weak, strong):
        plan = make_plan(weak, strong, [1.0], None, **rules)
        judged, note = open_judged(model, weak, strong, plan, how)
    for alpha in (0.3, -1.5, 0.0):
        judged.alpha = alpha
        expo.merge(sft, aligned, alpha, folder / str(alpha), **rules)
        wanted = loaded(folder / str(alpha)).state_dict()
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        wrong = [name for name in wanted if not torch.equal(bits(found[name]), bits(wanted[name]))]
        assert not wrong, (alpha, wrong)
        check_merge(folder / str(alpha), digests(model))
        assert (digests(model) == before) is (alpha == 0)
    judged.close()
    assert digests(model) == before
    return note


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    return written(folder / "sft", qwen(), 1), written(folder / "aligned", qwen(), 2)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("on_unpaired", ["error", "aligned"])
def test_fused_experts_are_judged_as_they_are_merged(
    mixture: tuple[Path, Path], keep: str, on_unpaired: str, tmp_path: Path
) -> None:
    names = set(dict(loaded(mixture[1]).named_parameters()))
    assert not names <= set(load_file(mixture[1] / "model.safetensors")), "this library fuses nothing: test another way"
    note = judged_is_merged(*mixture, options(keep, on_unpaired), tmp_path)
    assert "sft is loaded as a model too" in note


def test_a_model_whose_names_are_those_of_its_files_takes_no_second_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, aligned = written(tmp_path / "sft", llama(), 1), written(tmp_path / "aligned", llama(), 2)
    monkeypatch.setattr(judging, "load_model", None)
    with pytest.raises(TypeError):
        judged_is_merged(*(written(tmp_path / str(n), qwen(), n) for n in (3, 4)), options(), tmp_path / "fused")
    monkeypatch.undo()
    assert judged_is_merged(sft, aligned, options(), tmp_path / "out") == ""


def bf16_router(weights: Weights) -> None:
    """As the published files have it."""
    for name in weights:
        weights[name] = weights[name].bfloat16() if name.endswith("gate.weight") else weights[name]


def extra_layer(weights: Weights) -> None:
    """As files have one for predicting a token more, which transformers does not load."""
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        weights[name.replace("layers.1.", "layers.2.")] = weights[name] + 1


def test_a_weight_that_the_library_widens_is_rounded_as_the_merge_rounds_it(tmp_path: Path) -> None:
    sft = written(tmp_path / "sft", deepseek(), 1, bf16_router)
    aligned = written(tmp_path / "aligned", deepseek(), 2, bf16_router)
    assert loaded(aligned).model.layers[1].mlp.gate.weight.dtype == torch.float32
    judged_is_merged(sft, aligned, options(), tmp_path)


@pytest.mark.parametrize("make", [llama, deepseek])
def test_tensors_of_the_files_that_the_model_does_not_use_are_no_hindrance(make: Any, tmp_path: Path) -> None:
    sft, aligned = (written(tmp_path / str(seed), make(), seed, extra_layer) for seed in (1, 2))
    judged_is_merged(sft, aligned, options(), tmp_path / "out")


def test_resized_vocabularies_and_ties_beside_fused_experts(tmp_path: Path) -> None:
    sft = written(tmp_path / "sft", qwen(tied=True), 1)
    aligned = written(tmp_path / "aligned", qwen(vocabulary=1540, tied=True), 2)
    judged_is_merged(sft, aligned, options(on_mismatch="rows"), tmp_path / "rows")
    judged_is_merged(sft, aligned, options(on_mismatch="aligned"), tmp_path / "aligned-out")
    untied = written(tmp_path / "untied", qwen(), 3)
    judged_is_merged(sft, untied, options(), tmp_path / "untied-out")


def single(weights: Weights) -> None:
    """Weights in fp32, under a config that says bf16."""
    weights.update({name: tensor.float() * 1.001 for name, tensor in weights.items()})


def search(sft: Path, aligned: Path, out: Path, alphas: Any = (0.5,), **more: Any) -> Any:
    return search_alpha(sft, aligned, PROMPTS, length, alphas, out, max_new_tokens=4, device="cpu", **more)


def test_what_cannot_be_judged_as_it_is_merged_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    sft = written(tmp_path / "sft", llama(), 1)
    aligned = written(tmp_path / "aligned", llama(), 2, single)
    with pytest.raises(expo.PlanError) as caught:
        search(sft, aligned, tmp_path / "search")
    text = str(caught.value)
    assert text.startswith("the model that would be judged is not the one that the merge writes: 21 weights, 100.0% of")
    assert "model.embed_tokens.weight: aligned is F32 in the files and BF16 in memory" in text
    assert "and 1 more" in text
    assert len(text.splitlines()) <= 40
    assert (tmp_path / "search" / "replies.jsonl").read_bytes() == b"", "before anything is sampled"
    assert "with that folder as --aligned, --alphas 0 and an --out of its own" in text
    expo.merge(sft, aligned, 0.5, tmp_path / "merged")
    assert search(sft, tmp_path / "merged", tmp_path / "advice", [0.0]).best == 0
    lines = [json.loads(line) for line in (tmp_path / "advice" / "replies.jsonl").read_text().splitlines()]
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS)


def lacks_an_expert(weights: Weights) -> None:
    for name in [name for name in weights if "layers.1.mlp.experts.3." in name]:
        del weights[name]


def test_an_expert_that_sft_lacks_is_merged_as_aligned_has_it_and_not_judged_otherwise(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    sft = written(tmp_path / "sft", qwen(), 1, lacks_an_expert)
    with pytest.raises(expo.PlanError, match=r"layers\.1\.mlp\.experts\.(gate_up|down)_proj: no tensor of al"):
        search(sft, mixture[1], tmp_path / "search", on_unpaired="aligned")


def fused(weights: Weights) -> None:
    """Experts in one tensor, as they are in memory and as files may have them too."""
    for layer in range(2):
        parts = {kind: [weights.pop(f"model.layers.{layer}.mlp.experts.{number}.{kind}_proj.weight")
                        for number in range(4)] for kind in ("gate", "up", "down")}  # fmt: skip
        both = [torch.cat(each) for each in zip(parts["gate"], parts["up"], strict=True)]
        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts["down"])


def test_experts_that_the_library_pairs_and_the_merge_does_not_are_refused(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    sft = written(tmp_path / "sft", qwen(), 1, fused)
    with pytest.raises(expo.PlanError, match=r"4 weights, .* differ:(\n.*)*made of several tensors of the files"):
        search(sft, mixture[1], tmp_path / "search", on_unpaired="aligned")
    aligned = written(tmp_path / "aligned", qwen(), 2, fused)
    judged_is_merged(sft, aligned, options(), tmp_path / "out")


def test_an_sft_without_a_config_is_no_model_and_the_refusal_says_so(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copyfile(mixture[0] / "model.safetensors", tmp_path / "sft.safetensors")
    with pytest.raises(expo.PlanError, match=r"sft cannot be loaded as a model, which might do: .*sft\.safetensors"):
        search(tmp_path / "sft.safetensors", mixture[1], tmp_path / "search")


def test_an_sft_for_which_a_gpu_has_no_room_may_be_read_on_the_cpu(
    mixture: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def full(_: Any, path: str, device: torch.device, *rest: Any) -> Any:
        places.append(device.type)
        raise expo.EngineError(f"{path} does not fit into the memory of {device}: try --device cpu")

    monkeypatch.setattr(judging, "load_model", full)
    model: Any = loaded(mixture[1])
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with open_inputs(*mixture) as (weak, strong):
        plan = make_plan(weak, strong, [1.0])
        for keep in KEEP:
            with pytest.raises(expo.EngineError, match="try --device cpu, or --keep host or disk, with which sft is"):
                open_judged(model, weak, strong, plan, options(keep))
    assert places == ["cuda", "cpu", "cpu"]


def test_a_square_matrix_that_the_library_transposes_is_not_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, aligned = written(tmp_path / "sft", llama(), 1), written(tmp_path / "aligned", llama(), 2)
    model = loaded(aligned)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t().contiguous()

    def no(*_: Any) -> Any:
        raise expo.CheckpointError("not now")

    monkeypatch.setattr(judging, "load_model", no)
    with open_inputs(sft, aligned) as (weak, strong):
        plan = make_plan(weak, strong, [1.0])
        with pytest.raises(
            expo.PlanError, match=r"1 weights, .* differ:\n  model\.layers\.0\.self_attn\.q_proj\.weight"
        ):
            open_judged(model, weak, strong, plan, options())


def words(sft: Path, aligned: Path, folder: Path, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "judging_reward.py").write_text(
        "calls = 0\ndef rising(prompts, replies):\n"
        "    global calls\n    calls += 1\n    return [float(calls)] * len(replies)\n"
    )
    return [
        *("--sft", str(sft), "--aligned", str(aligned), "--prompts", str(folder / "prompts.txt"), "--device", "cpu"),
        *("--reward", "judging_reward:rising", "--alphas", "0.5", "--max-new-tokens", "4", "--out", "search", *more),
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def models() -> int:
    """How many there are in memory, also those that await the garbage collector."""
    return sum(
        issubclass(type(each), transformers.PreTrainedModel) and hasattr(each, "lm_head") for each in gc.get_objects()
    )


@pytest.fixture
def no_collector(frozen_heap: None) -> Iterator[None]:
    gc.collect()
    gc.disable()  # so that what is freed does not depend on when it runs
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_no_more_models_are_held_than_are_needed(
    mixture: tuple[Path, Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two beside originals on the disk while these are read, one while replies are sampled and while it is checked."""
    counts = []

    def counted(kind: Any, path: Any, *rest: Any) -> Any:
        model = load_model(kind, path, *rest)
        model.__dict__["itself"] = model  # as a library's hooks make it
        counts.append((Path(path).name, models()))
        return model

    monkeypatch.setattr(judging, "load_model", counted)
    monkeypatch.setattr(search_models, "load_model", counted)
    take = judging.digests
    monkeypatch.setattr(judging, "digests", lambda model: counts.append(("digests", models())) or take(model))
    assert main(words(*mixture, here, "--merge", "merged", "--quiet", "--keep", "disk")) == 0
    assert counts == [("aligned", 1), ("sft", 2), ("digests", 1), ("merged", 1), ("digests", 1)]


def test_live_says_what_helps_where_names_differ(mixture: tuple[Path, Path]) -> None:
    model = loaded(mixture[1])
    with pytest.raises(
        expo.PlanError, match=r"^names in memory are not those of the files; .* give sft as a model that"
    ):
        expo.Live(model, mixture[0])
    expo.Live(model, loaded(mixture[0])).close()


# The command line


@pytest.mark.parametrize("more", [[], ["--on-unpaired", "aligned"]])
def test_a_search_over_a_mixture_and_its_merge(
    mixture: tuple[Path, Path], here: Path, more: list[str], capsys: Any
) -> None:
    assert main(words(*mixture, here, *more)) == 0
    out, err = capsys.readouterr()
    assert "expo: weights have other names in memory than in the files, so sft is loaded as a model too" in err
    command = next(line for line in out.splitlines() if line.startswith("merge: "))
    assert command.endswith(" ".join(["--alpha 0.5", *more]))
    assert main(words(*mixture, here, *more, "--merge", "merged")) == 0  # all replies are there
    out, err = capsys.readouterr()
    assert "the model is loaded once more, to compare the merge with it" in err
    assert "merged at alpha 0.5 -> merged" in out
    assert f"checked: all {len(saved(loaded(here / 'merged')))} weights are those that were judged, bit for bit" in out
    assert "digests" not in json.loads((here / "search" / "summary.json").read_text())


def test_a_merge_that_is_not_what_was_judged_is_an_error(
    mixture: tuple[Path, Path], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = expo.tensors.live._remember

    def sabotaged(*arguments: Any) -> Any:
        trios, size = whole(*arguments)
        return trios[1:], size

    monkeypatch.setattr(expo.tensors.live, "_remember", sabotaged)
    assert main(words(*mixture, here, "--merge", "merged", "--quiet")) == 3
    out, err = capsys.readouterr()
    assert "merged at alpha 0.5 -> merged" in out
    assert "checked" not in out
    assert "the merge stands at merged, but it is not the model that was judged: 1 of " in err
    assert "\n  model.embed_tokens.weight" in err
    assert (here / "merged" / "model.safetensors").exists()


def test_a_merge_that_cannot_be_loaded_is_an_error_that_says_where_it_stands(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    model = loaded(mixture[1])
    check_merge(mixture[1], digests(model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(expo.CheckpointError, match=r"the merge stands at .*empty, but it cannot be compared"):
        check_merge(tmp_path / "empty", digests(model))
    with pytest.raises(expo.CheckpointError, match=rf"{len(digests(model))} of {len(digests(model))} weights differ"):
        check_merge(mixture[0], digests(model))


def test_replies_of_before_experts_moved_are_not_gone_on_with(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    search(*mixture, tmp_path / "search", on_unpaired="aligned")
    path = tmp_path / "search" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["judged"]
    path.write_text(json.dumps(settings))
    with pytest.raises(expo.OutputError, match='judged was null and is now "exactly what the merge writes"'):
        search(*mixture, tmp_path / "search", on_unpaired="aligned")


def test_digests_in_python(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    calls = 0

    def rising(prompts: list[str], replies: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(calls)] * len(replies)

    result = search_alpha(
        *mixture, PROMPTS, rising, [0.5], tmp_path / "search", max_new_tokens=4, device="cpu", digest=True
    )
    assert result.best == 0.5
    expo.merge(*mixture, 0.5, tmp_path / "merged")
    check_merge(tmp_path / "merged", result.digests)
