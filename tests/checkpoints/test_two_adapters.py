"""Two adapters over one base, as PEFT saves them: the bits of the documented formulas, and the model they belong to."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import fingerprint, quiet, read_file, read_folder, staging_folder

import expo
from expo.diff import compare
from expo.errors import CheckpointError, UsageError
from expo.fast import main

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


@pytest.mark.parametrize("alpha", [0.3, 0.0, -1.0])
def test_every_tensor_is_what_the_documents_say(made: Made, tmp_path: Path, alpha: float) -> None:
    before = fingerprint(made.base, *made.pair)
    result = expo.merge(*made.pair, alpha, tmp_path / "out", base=made.base, verify=True)
    assert_equal(read_folder(tmp_path / "out"), expected(made, alpha))
    assert fingerprint(made.base, *made.pair) == before
    assert result.outputs[0].non_finite == 0


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
