"""Two adapters over one base, as PEFT saves them: the bits of the documented formulas, and the model they belong to."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import fingerprint, quiet, read_file, read_folder, safetensors_bytes, staging_folder

import expo
from expo.diff import compare
from expo.errors import CheckpointError, UsageError
from expo.fast import main
from expo.inputs.resolve import complete_request
from expo.merging.job import open_job
from expo.merging.process_group import SingleProcess
from expo.options import MergeOptions
from expo.search import search_alpha

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
PREFIX = "base_model.model."
KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Kind(NamedTuple):
    """The arguments of LoraConfig for sft's adapter and for aligned's; True if the base ties its head."""

    sft: dict[str, Any]
    aligned: dict[str, Any]
    tied: bool = False


CASES = {
    "other modules": Kind(
        {"target_modules": ["q_proj", "up_proj"], "r": 5, "lora_alpha": 7},
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "use_rslora": True},
    ),
    "patterns": Kind(
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"o_proj": 2}},
        {"target_modules": "all-linear", "r": 1},
    ),
    "whole in both": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 3},
    ),
    "whole in sft": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "r": 3},
    ),
    "whole in aligned": Kind(
        {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ),
    "sft unties": Kind({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"]}, tied=True),
    "aligned unties": Kind({"target_modules": ["q_proj"]}, {"target_modules": ["lm_head"]}, tied=True),
}
OVER = ("base", "sft")


class Made(NamedTuple):
    """The folders of a base and two adapters, the scales of their modules, and what PEFT merges them to in fp32."""

    over: str
    base: Path
    sft: Path
    aligned: Path
    scales: tuple[dict[str, float], dict[str, float]]
    merged: tuple[dict[str, Any], dict[str, Any]]

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.sft, self.aligned

    @property
    def unties(self) -> bool:
        return json.loads((self.base / "config.json").read_text())["tie_word_embeddings"]

    @property
    def words(self) -> list[str]:
        return ["--base", str(self.base), "--sft", str(self.sft), "--aligned", str(self.aligned)]


def train(model: Any, config: dict[str, Any], folder: Path, seed: int) -> tuple[dict[str, float], Any]:
    """Train an adapter on a model, save it, and return the scales of its modules and the merged model."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(folder)
    scales = {
        key.removeprefix(PREFIX): float(module.scaling["default"])
        for key, module in wrapped.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    return scales, wrapped.merge_and_unload()


def state(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def untied(model: Any) -> Any:
    """Return the model with a head of its own, as training a part of a tied pair in PEFT leaves it."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    place = tmp_path_factory.mktemp("adapters")

    @cache
    def make(name: str, over: str) -> Made:
        kind, folder = CASES[name], place / f"{name} {over}"
        base, sft, aligned = (folder / each for each in ("base", "sft", "aligned"))
        with quiet():
            torch.manual_seed(3)
            config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=kind.tied)
            transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)

            def load() -> Any:
                model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
                return untied(model) if kind.tied else model

            model = load()
            scales, model = train(model, kind.sft, sft, 5)
            merged = state(model)
            if over == "base":
                model = load()
            else:
                model.name_or_path = str(sft)
            more_scales, model = train(model, kind.aligned, aligned, 6)
            return Made(over, base, sft, aligned, (scales, more_scales), (merged, state(model)))

    return make


@pytest.fixture(params=[(name, over) for name in CASES for over in OVER], ids=lambda each: f"{each[0]} over {each[1]}")
def made(request: pytest.FixtureRequest, make: Callable[..., Made]) -> Made:
    return make(*request.param)


@pytest.fixture
def plain(make: Callable[..., Made]) -> Made:
    return make("other modules", "base")


# The expected tensors, from the files' bytes and the documents alone


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    """Return a tensor as fp32."""
    dtype, shape, data = tensor
    return np.frombuffer(data, KINDS[dtype]).astype(np.float32).reshape(shape)


def parts(folder: Path, scales: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an adapter's deltas and its whole tensors, in fp32 and by the base's names."""
    stored, deltas = read_file(folder / "adapter_model.safetensors"), {}
    for module, scale in scales.items():
        embedding = f"{PREFIX}{module}.lora_embedding_A" in stored
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        right, left = (array(stored[f"{PREFIX}{module}.{name}"]) for name in names)
        left, right = (right.T, left.T) if embedding else (left, right)
        delta = np.zeros((left.shape[0], right.shape[1]), np.float32)
        for k in range(left.shape[1]):
            delta += left[:, k, None] * right[None, k, :]
        deltas[f"{module}.weight"] = delta * np.float32(scale)
    named = {
        key.removeprefix(PREFIX).replace(".base_layer.", "."): array(tensor)
        for key, tensor in stored.items()
        if "lora_" not in key
    }
    return deltas, {name: tensor for name, tensor in named.items() if name not in deltas}


def expected(made: Made, alpha: float, dtype: str = "BF16") -> Tensors:
    """Return every tensor of the output, from the formula of the documents."""
    (sft_deltas, sft_whole), (own_deltas, own_whole) = map(parts, made.pair, made.scales)
    stored = {name: array(tensor) for name, tensor in read_folder(made.base).items()}
    if "lm_head.weight" not in stored and "lm_head.weight" in {*sft_deltas, *own_deltas}:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    tensors, factor = {}, np.float32(1 + alpha)
    for name, base in stored.items():
        below = sft_whole.get(name, base)
        sft = below + sft_deltas[name] if name in sft_deltas else below
        zero, own = np.float32(0), own_deltas.get(name)
        if name in own_whole:
            value = own_whole[name]
            value = value + np.float32(alpha) * (value - sft)
        elif made.over == "sft":
            aligned = sft if own is None else sft + own
            value = sft if own is None else aligned if alpha == 0 else sft + factor * own
        elif name in sft_whole:
            aligned = base if own is None else base + own
            value = aligned + np.float32(alpha) * (aligned - sft)
        elif alpha == 0:
            value = base if own is None else base + own
        elif own is None and name not in sft_deltas:
            value = base
        else:
            value = sft + factor * ((zero if own is None else own) - sft_deltas.get(name, zero))
        assert value.dtype == np.float32
        tensors[name] = (dtype, value.shape, value.astype(KINDS[dtype]).tobytes())
    return tensors


def assert_equal(actual: Tensors, wanted: Tensors) -> None:
    assert {name: tensor[:2] for name, tensor in actual.items()} == {name: each[:2] for name, each in wanted.items()}
    assert [name for name in wanted if actual[name] != wanted[name]] == []


# The bits


def test_every_tensor_is_what_the_documents_say(made: Made, tmp_path: Path) -> None:
    before, alphas = fingerprint(made.base, *made.pair), (0.3, 0.0, -1.0)
    result = expo.merge(*made.pair, alphas, tmp_path / "at-{alpha}", base=made.base, verify=True)
    for alpha, output in zip(alphas, result.outputs, strict=True):
        assert_equal(read_folder(Path(output.path)), expected(made, alpha))
        assert output.non_finite == 0
    assert fingerprint(made.base, *made.pair) == before


@pytest.mark.parametrize("side", [0, 1])
def test_each_side_is_what_peft_merges(made: Made, tmp_path: Path, side: int) -> None:
    """Alpha 0 gives aligned and alpha -1 gives sft, up to the order in which PEFT sums a product."""
    expo.merge(*made.pair, side - 1.0, tmp_path / "out", base=made.base, dtype="fp32")
    found = read_folder(tmp_path / "out")
    for name, theirs in made.merged[side].items():
        if name in found:
            assert np.abs(array(found[name]) - theirs).max() <= 2e-6 * np.abs(theirs).max(), name
        else:
            assert name == "lm_head.weight"


def test_the_command_gives_the_same_and_the_output_loads(made: Made, tmp_path: Path) -> None:
    arguments = [*made.words, "--alpha", "0.3", "--out", str(tmp_path / "out"), "--check", "--quiet"]
    assert main(arguments) == 0
    assert_equal(read_folder(tmp_path / "out"), expected(made, 0.3))
    assert not staging_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [0.3])
def test_stream_gives_the_same(made: Made, monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    monkeypatch.setattr("expo.tensors.streaming.CHUNK", 1000)
    monkeypatch.setattr("expo.execution.tensor_source.CONVERTED_ELEMENTS", 333)
    names = {np.dtype(kind): dtype for dtype, kind in KINDS.items()}
    with pytest.warns(UserWarning, match="apart") if made.unties else contextlib.nullcontext():
        arrays = expo.stream(*made.pair, alpha, framework="numpy", base=made.base, adapter_over=made.over)
    assert_equal({name: (names[x.dtype], x.shape, x.tobytes()) for name, x in arrays}, expected(made, alpha))


def test_diff_compares_the_sums_that_are_not_rounded(made: Made) -> None:
    found = compare(*made.pair, base=made.base)
    both = [
        {name: array(tensor).astype(np.float64) for name, tensor in expected(made, alpha, "F32").items()}
        for alpha in (-1.0, 0.0)
    ]
    for tensor in found.tensors:
        sft, aligned = (side[tensor.name] for side in both)
        norm = np.linalg.norm(aligned - sft)
        assert tensor.difference_norm == pytest.approx(norm, rel=1e-4, abs=1e-6 * np.linalg.norm(sft)), tensor.name
    assert {tensor.name for tensor in found.tensors} == set(both[0])


def test_live_takes_the_weights_that_a_merge_of_sft_writes(made: Made, tmp_path: Path) -> None:
    expo.merge(made.base, made.sft, 0, tmp_path / "sft")
    expo.merge(*made.pair, 0, tmp_path / "aligned", base=made.base)
    expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.3, tmp_path / "out", on_unpaired="aligned")
    wanted = read_folder(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=torch.bfloat16)
    with expo.Live(model, made.sft, base=made.base, on_unpaired="aligned") as live:
        live.alpha = 0.3
        state = model.state_dict()
        for name, (_, _, data) in wanted.items():
            assert state[name].view(torch.int16).numpy().tobytes() == data, name


# The place of aligned's adapter


def copy(made: Made, folder: Path, **names: str | None) -> Made:
    """Return copies of the folders, with other names of the models that the adapters were trained on."""
    folders = [Path(shutil.copytree(each, folder / each.name)) for each in (made.base, *made.pair)]
    for role, name in names.items():
        path = folder / role / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": name}
        path.write_text(json.dumps(config))
    return made._replace(base=folders[0], sft=folders[1], aligned=folders[2])


def plan(made: Made, *more: str) -> list[str]:
    return [*made.words, "--alpha", "0.3", "--plan", *more]


@pytest.mark.parametrize("name", ["{base}", "{base}/", "{sft}", "{sft}/merged", "org/model", None, "elsewhere"])
def test_the_config_says_where_the_adapter_belongs(
    make: Callable[..., Made], name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = "sft" if name and "sft" in name else "base"
    made = make("other modules", over)
    text = name and name.format(base=tmp_path / "base", sft=tmp_path / "sft")
    made = copy(made, tmp_path, sft=str(made.base), aligned=text)
    if name and "{" in name:
        assert main(plan(made)) == 0
        model = "the base" if over == "base" else "the model that sft's adapter makes of the base"
        line = f"base {made.base}: aligned's adapter was trained on {model}, because its config names {text!r}"
        assert line in capsys.readouterr().out
        assert_equal(merged(made, tmp_path / "out"), expected(made, 0.3))
        return
    assert main(plan(made)) == 3
    message = capsys.readouterr().err
    assert f"base_model_name_or_path is {text!r}, which is neither" in message
    assert main(plan(made, "--adapter-over", "base", "--json")) == 0
    said = json.loads(capsys.readouterr().out)["base"]
    assert said == f"base {made.base}: aligned's adapter was trained on the base, as --adapter-over says"
    for over, option in (("base", "--adapter-over base"), ("sft", "--adapter-over sft")):
        assert option in message
        out = tmp_path / f"over {over}"
        assert main([*made.words, "--alpha", "0.3", "--out", str(out), *option.split(), "--quiet"]) == 0
        assert_equal(read_folder(out), expected(made._replace(over=over), 0.3))


def merged(made: Made, out: Path) -> Tensors:
    expo.merge(*made.pair, 0.3, out, base=made.base)
    return read_folder(out)


@pytest.mark.parametrize("names", [("org/model", "org/model"), ("org/model", "org/model@main")])
def test_two_configs_that_name_one_repository(plain: Made, tmp_path: Path, names: tuple[str, str]) -> None:
    made = copy(plain, tmp_path, sft=names[0], aligned=names[1])
    assert_equal(merged(made, tmp_path / "out"), expected(made, 0.3))


def test_the_option_counts_before_the_config(plain: Made, tmp_path: Path) -> None:
    expo.merge(*plain.pair, 0.3, tmp_path / "out", base=plain.base, adapter_over="sft")
    assert_equal(read_folder(tmp_path / "out"), expected(plain._replace(over="sft"), 0.3))


@pytest.mark.parametrize("over", OVER)
def test_the_card_says_the_place_and_its_command_makes_the_same(
    make: Callable[..., Made], over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("patterns", over)
    wanted = merged(made, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- base of both adapters: `{made.base.name}`" in card
    model = "the base" if made.over == "base" else "the model that sft's adapter makes of the base"
    assert f"- aligned's adapter was trained on {model}, because its config names" in card
    assert "- base\n" in card.split("---")[1]
    command = next(line for line in card.splitlines() if line.startswith("$ python -m expo.fast"))
    monkeypatch.chdir(made.base.parent)
    out = tmp_path / "again"
    assert main([*shlex.split(command)[4:], "--out", str(out), "--quiet"]) == 0
    assert_equal(read_folder(out), wanted)


@pytest.mark.parametrize("name", ["other modules", "patterns"])
def test_an_adapter_that_did_not_start_from_sfts_has_a_note(
    make: Callable[..., Made], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(name, "base")
    note = "did not start from the numbers of sft's adapter"
    assert main(plan(made)) == 0
    printed = capsys.readouterr().out
    assert note in printed
    for over in OVER:
        assert f"--adapter-over {over}" in printed
        assert main(plan(made, "--adapter-over", over)) == 0
        assert note not in capsys.readouterr().out
    assert main(plan(make(name, "sft"))) == 0
    assert note not in capsys.readouterr().out
    # Both adapters have the same modules and ranks, and one of them was trained further or is new.
    further, new = (Path(shutil.copytree(made.sft, tmp_path / each)) for each in ("further", "new"))
    stored = read_file(made.sft / "adapter_model.safetensors")
    generator = np.random.default_rng(1)
    for folder, share in ((further, 0.9), (new, 0)):
        values = {key: share * array(each) + 0.02 * generator.normal(size=each[1]) for key, each in stored.items()}
        tensors = {key: ("F32", x.shape, x.astype(np.float32).tobytes()) for key, x in values.items()}
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
        assert main(plan(made._replace(aligned=folder))) == 0
        assert (note in capsys.readouterr().out) is (folder is new)


# Refusals, and what their advice does


def test_without_a_base_the_message_has_the_option_that_works(
    plain: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*plain.words[2:], "--alpha", "0.3", "--out", str(tmp_path / "out")]
    assert main(arguments) == 3
    message = capsys.readouterr().err
    option = shlex.split(message.rpartition("so add ")[2])
    assert option == ["--base", str(plain.base)]
    assert f"its config names {str(plain.base)!r}" in message
    assert main([*arguments, *option, "--quiet"]) == 0
    assert_equal(read_folder(tmp_path / "out"), expected(plain, 0.3))


def test_without_a_base_that_is_here(plain: Made, tmp_path: Path) -> None:
    made = copy(plain, tmp_path, sft="/nowhere/at all", aligned=None)
    with pytest.raises(CheckpointError, match=r"its config names '/nowhere/at all', which is not here$"):
        expo.merge(*made.pair, 0.3, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"`base` must name the checkpoint that sft's adapter was trained from$"):
        expo.merge(made.aligned, made.sft, 0.3, tmp_path / "out")


def test_a_whole_model_beside_an_adapter(
    plain: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expo.merge(*plain.pair, 0, tmp_path / "whole", base=plain.base)
    for base in ([], ["--base", str(plain.base)]):
        words = ["--sft", str(plain.sft), "--aligned", str(tmp_path / "whole"), *base, "--alpha", "0.3", "--plan"]
        assert main(words) == 3
        message = capsys.readouterr().err
        command = message.partition("with python -m expo.fast ")[2].partition(" --out FOLDER")[0]
        folder = tmp_path / f"sft-{len(base)}"
        assert main([*shlex.split(command), "--out", str(folder), "--quiet"]) == 0
        assert main(["--sft", str(folder), "--aligned", str(tmp_path / "whole"), "--alpha", "0.3", "--plan"]) == 0
        capsys.readouterr()
    for sft, aligned in ((plain.base, plain.sft), (plain.base, tmp_path / "whole")):
        with pytest.raises(CheckpointError, match=r"no PEFT adapter, and `base` is for two adapters .* leave it out"):
            expo.merge(sft, aligned, 0.3, tmp_path / "out", base=plain.base)
        expo.merge(sft, aligned, 0.3, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="a PEFT adapter; only"):
        expo.merge(*plain.pair, 0.3, tmp_path / "out", base=plain.sft, overwrite=True)


def test_options_that_make_no_sense(plain: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`adapter_over` must be one of base, sft, got 'aligned'"):
        expo.merge(*plain.pair, 0.3, tmp_path / "out", base=plain.base, adapter_over="aligned")
    with pytest.raises(UsageError, match="which must be given too"):
        expo.merge(*plain.pair, 0.3, tmp_path / "out", adapter_over="sft")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="sft is a model in memory"):
        expo.Live(model, model, base=plain.base)
    with pytest.raises(CheckpointError, match="no PEFT adapter, so it has no `base`"):
        expo.Live(model, plain.base, base=plain.base)


def test_a_kind_that_is_not_read_is_refused_on_both_sides(plain: Made, tmp_path: Path) -> None:
    for role in ("sft", "aligned"):
        made = copy(plain, tmp_path / role)
        path = tmp_path / role / role / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
        with pytest.raises(CheckpointError, match=rf"{role}/adapter_config.json: use_dora is True: DoRA"):
            expo.merge(*made.pair, 0.3, tmp_path / "out", base=made.base)


def test_a_base_that_the_adapters_do_not_fit(plain: Made, tmp_path: Path) -> None:
    with quiet():
        config = transformers.LlamaConfig(**LLAMA | {"hidden_size": 48})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    message = rf"sft/adapter_model.* sft's .* is \[56, 48\].*; sft is the base {tmp_path}/other in this message$"
    with pytest.raises(CheckpointError, match=message):
        expo.merge(*plain.pair, 0.3, tmp_path / "out", base=tmp_path / "other", adapter_over="base")


@pytest.mark.parametrize("role", ["base", "sft", "aligned"])
def test_no_output_is_written_into_an_input(plain: Made, role: str) -> None:
    out = getattr(plain, role) / "out"
    with pytest.raises(expo.OutputError, match=rf"lies inside the input .*/{role}; choose another `out`"):
        expo.merge(*plain.pair, 0.3, out, base=plain.base)
    assert not out.exists()


def test_an_interrupted_merge_of_another_place_is_not_continued(plain: Made, tmp_path: Path) -> None:
    with open_job_of(plain, tmp_path, None) as one, open_job_of(plain, tmp_path, "sft") as other:
        assert one.identity != other.identity
        assert all("adapter_model.safetensors" in one.identity[role] for role in ("sft", "aligned"))
        assert "adapter below: adapter_model.safetensors" in other.identity["aligned"]


def open_job_of(made: Made, folder: Path, over: str | None) -> Any:
    pair = complete_request(*made.pair, 0.3, None, made.base, over)
    return open_job(pair, folder / "out", MergeOptions((0.3,)), SingleProcess())


def test_both_adapters_are_read_once_for_several_alphas(plain: Made, tmp_path: Path) -> None:
    result = expo.merge(*plain.pair, (0.0, 0.3), tmp_path / "at-{alpha}", base=plain.base)
    for alpha in (0.0, 0.3):
        assert_equal(read_folder(tmp_path / f"at-{alpha:g}"), expected(plain, alpha))
    tensors = (read_folder(plain.base), *(read_file(each / "adapter_model.safetensors") for each in plain.pair))
    assert result.bytes_read == sum(len(data) for each in tensors for _, _, data in each.values())
    reasons = dict(result.noted)
    names = ("q_proj", "v_proj", "up_proj")
    found = [next(reason for name, reason in reasons.items() if part in name) for part in names]
    assert found == [
        "sft's adapter of rank 5 and aligned's adapter of rank 2", "aligned's adapter of rank 2",
        "sft's adapter of rank 5",
    ]  # fmt: skip


def test_a_search_names_the_commands_that_make_whole_models(
    plain: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError) as raised:
        search_alpha(*plain.pair, ["a"], "taste:plain", out=tmp_path / "search")
    commands = re.findall(r"python -m expo\.fast (.*? --out \w+)", str(raised.value))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main([*shlex.split(command), "--quiet"]) == 0
    assert_equal(read_folder(tmp_path / "SFT"), expected(plain, -1))
    assert_equal(read_folder(tmp_path / "ALIGNED"), expected(plain, 0))
