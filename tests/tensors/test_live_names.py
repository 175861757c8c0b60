"""Live over a folder whose names are not those of the model in memory: tied heads, value heads, wrappers, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import quiet
from safetensors.torch import load_file, save_file
from tiny_models import LOAD, pair_of

import expo

ALPHA = 0.3
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


class WithValueHead(torch.nn.Module):
    """A model with a value head, with the names of TRL's AutoModelForCausalLMWithValueHead."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = torch.nn.ModuleDict({"summary": torch.nn.Linear(32, 1)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return pair_of(transformers.LlamaForCausalLM(CONFIG), tmp_path_factory.mktemp("plain"))


def model_of(folder: Path) -> Any:
    with quiet():
        return LOAD(folder, dtype="auto")


def formula(aligned: torch.Tensor, sft: torch.Tensor) -> torch.Tensor:
    alpha = torch.tensor(ALPHA, dtype=torch.float32)
    return (aligned.float() + alpha * (aligned.float() - sft.float())).to(aligned.dtype)


def check_live(model: torch.nn.Module, inner: Any, sft: Path, states: tuple[Any, Any]) -> None:
    """Set alpha in `model`; the weights of `inner`, a part of it, must be the formula's, and aligned's at the end."""
    with expo.Live(model, sft) as live:
        live.alpha = ALPHA
        for name, tensor in inner.state_dict().items():
            assert torch.equal(tensor, formula(states[0][name], states[1][name])), name
    for name, tensor in inner.state_dict().items():
        assert torch.equal(tensor, states[0][name]), name


def states_of(plain: tuple[Path, Path]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of aligned and of sft."""
    return load_file(plain[1] / "model.safetensors"), load_file(plain[0] / "model.safetensors")


def with_value_head(folder: Path, to: Path) -> Path:
    """Copy a folder, with the value head that TRL's save_pretrained adds."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(folder / "model.safetensors") | head, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_folder_with_a_value_head(plain: tuple[Path, Path], tmp_path: Path) -> None:
    sft, states = with_value_head(plain[0], tmp_path / "sft"), states_of(plain)
    model = model_of(plain[1])
    check_live(model, model, sft, states)
    wrapper = WithValueHead(model_of(plain[1]))
    head = {name: tensor.clone() for name, tensor in wrapper.v_head.state_dict().items()}
    with expo.Live(wrapper, sft) as live:
        live.alpha = ALPHA
        for name, tensor in wrapper.v_head.state_dict().items():
            assert torch.equal(tensor, formula(head[name], torch.ones(tensor.shape))), name
        for name, tensor in wrapper.pretrained_model.state_dict().items():
            assert torch.equal(tensor, formula(states[0][name], states[1][name])), name


def test_a_model_in_wrappers(plain: tuple[Path, Path]) -> None:
    model = model_of(plain[1])
    check_live(torch.nn.ModuleDict({"module": model}), model, plain[0], states_of(plain))


@pytest.mark.parametrize("role", ["model", "sft"])
def test_a_peft_model_is_refused_and_the_advice_is_right(role: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    with quiet():
        wrapped = peft.get_peft_model(model_of(plain[1]), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    pair = (wrapped, plain[0]) if role == "model" else (model_of(plain[0]), wrapped)
    for options in ({}, {"on_unpaired": "aligned"}):
        with pytest.raises(expo.UsageError, match=rf"^{role}: base_model\S+q_proj\.\S+ belongs to a PEFT adapter"):
            expo.Live(*pair, **options)
    if role == "model":
        model = wrapped.merge_and_unload()
        states = {name: tensor.clone() for name, tensor in model.state_dict().items()}, states_of(plain)[1]
        changed = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(states[0][changed], states_of(plain)[0][changed])
        check_live(model, model, plain[0], states)


@pytest.mark.parametrize("name", ["mamba", "bert"])
def test_a_tied_head_that_the_folder_has_alone(name: str, tmp_path: Path) -> None:
    """The folder has the tied matrix under the head's name, and the model in memory has it as its embedding."""
    library: Any = transformers
    config, kind, source, tied = {
        "mamba": (
            library.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8),
            library.MambaForCausalLM, "backbone.embeddings.weight", "lm_head.weight",
        ),
        "bert": (
            library.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=48, max_position_embeddings=16),
            library.BertForMaskedLM, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
        ),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        sft, aligned = pair_of(kind(config), tmp_path)
        model = kind.from_pretrained(aligned, dtype="auto")
        states = model.state_dict(), kind.from_pretrained(sft, dtype="auto").state_dict()
    states = {key: tensor.clone() for key, tensor in states[0].items()}, states[1]
    tensors = load_file(sft / "model.safetensors")
    tensors[tied] = tensors.pop(source)
    save_file(tensors, sft / "model.safetensors", metadata={"format": "pt"})
    assert source not in json.loads((sft / "config.json").read_text())
    check_live(model, model, sft, states)


MIXTRAL: Any = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return sft and aligned of a model whose experts are one tensor in memory and one tensor each in the files."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MIXTRAL)
    pair = pair_of(transformers.MixtralForCausalLM(config), tmp_path_factory.mktemp("mixtral"))
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in load_file(pair[0] / "model.safetensors")
    return pair


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_experts_that_the_loader_fuses(keep: str, mixtral: tuple[Path, Path]) -> None:
    model, states = model_of(mixtral[1]), [model_of(folder).state_dict() for folder in reversed(mixtral)]
    with expo.Live(model, mixtral[0], keep=keep) as live:
        live.alpha = ALPHA
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, formula(states[0][name], states[1][name])), name
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in model.state_dict().items())


def test_experts_of_two_dtypes(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """The experts are no single tensor then, and each is paired with its part of the fused tensor."""
    tensors = load_file(mixtral[0] / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    tensors[name] = tensors[name].float() + 2**-12
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "config.json").write_text((mixtral[0] / "config.json").read_text())
    save_file(tensors, sft / "model.safetensors", metadata={"format": "pt"})
    expo.merge(sft, mixtral[1], ALPHA, tmp_path / "out", quiet=True)
    expected, model = model_of(tmp_path / "out").state_dict(), model_of(mixtral[1])
    with expo.Live(model, sft) as live:
        live.alpha = ALPHA
        assert all(torch.equal(tensor, expected[each]) for each, tensor in model.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_experts_that_are_not_complete_are_refused(fault: str, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(mixtral[0] / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    tensor = tensors.pop(name)
    if fault != "missing":
        tensors[name] = tensor[:-1].clone()
    (tmp_path / "config.json").write_text((mixtral[0] / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        expo.PlanError, match=r"(?s)names of the model's tensors.*experts.gate_up_proj \(aligned only\)"
    ):
        expo.Live(model_of(mixtral[1]), tmp_path)
