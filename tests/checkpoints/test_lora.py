"""Adapters as PEFT saves them: the deltas are those of PEFT's own merge, and other adapters than LoRA are refused."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import quiet, random_tensors, safetensors_bytes

from expo.checkpoints.adapter import Adapter, LowRank
from expo.checkpoints.lora import is_adapter, open_adapter
from expo.checkpoints.lora_data import check_copies
from expo.checkpoints.safetensors_header import TensorInfo
from expo.checkpoints.weight_files import open_safetensors
from expo.errors import CheckpointError

Values = dict[str, Any]
LLAMA = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
GPT2 = {
    "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


class Made:
    """A base and an adapter in their folders, and the tensors that PEFT merges the two into."""

    def __init__(self, base: Path, folder: Path, merged: Values) -> None:
        self.base_shard = open_safetensors(str(base / "model.safetensors"))
        self.base = {tensor.name: tensor for tensor in self.base_shard.header.tensors}
        self.folder = folder
        self.merged = merged

    def open(self) -> Adapter:
        return open_adapter(str(self.folder), self.base)

    def values(self, shard: Any, tensor: TensorInfo) -> Any:
        assert tensor.dtype == "F32"
        data = bytearray(tensor.nbytes)
        shard.reader.read(tensor.start, data)
        return np.frombuffer(data, np.float32).reshape(tensor.shape)

    def result(self, adapter: Adapter) -> Values:
        """Return every tensor of the trained checkpoint, computed from the base and the adapter."""
        found = {}
        for name, tensor in self.base.items():
            if name in adapter.full:
                found[name] = self.values(adapter.shard, adapter.full[name])
                continue
            found[name] = self.values(self.base_shard, tensor)
            if name in adapter.low_rank:
                found[name] = found[name].astype(np.float64) + self.delta(adapter, adapter.low_rank[name])
        return found

    def delta(self, adapter: Adapter, low_rank: LowRank) -> Any:
        left, right = (self.values(adapter.shard, tensor).astype(np.float64) for tensor in low_rank[:2])
        left = left.T if low_rank.left_transposed else left
        right = right.T if low_rank.right_transposed else right
        assert left.shape[1] == right.shape[0] == low_rank.rank
        return low_rank.scale * (left @ right)


class Maker:
    """Makes adapters with PEFT over a model; each kind of model is saved once."""

    def __init__(self, place: Path) -> None:
        import peft
        import torch
        import transformers

        self.peft, self.torch, self.transformers, self.place, self.count = peft, torch, transformers, place, 0

    def model(self, kind: str, **options: Any) -> Any:
        self.torch.manual_seed(7)
        if kind == "llama":
            return self.transformers.LlamaForCausalLM(self.transformers.LlamaConfig(**{**LLAMA, **options}))
        if kind == "gpt2":
            return self.transformers.GPT2LMHeadModel(self.transformers.GPT2Config(**{**GPT2, **options}))
        # The base as AutoModel loads it.
        return self.transformers.LlamaModel(self.transformers.LlamaConfig(**{**LLAMA, **options}))

    def __call__(
        self, kind: str = "llama", base_kind: str = "", save: Any = None, name: str = "default", **options: Any
    ) -> Made:
        """Save an adapter and its base.

        `base_kind` is the class that the base is saved from, if it is another one; `name` is PEFT's for the adapter.
        """
        self.count += 1
        base, folder = self.place / f"base-{self.count}", self.place / f"adapter-{self.count}"
        shape = options.pop("shape", {})
        with quiet():
            model = self.model(kind, **shape)
            saved = self.model(base_kind, **shape) if base_kind else model
            if base_kind:
                getattr(saved, "model", saved).load_state_dict(getattr(model, "model", model).state_dict())
            saved.save_pretrained(base)
            wrapped = self.peft.get_peft_model(model, self.peft.LoraConfig(**options), adapter_name=name)
            self.train(wrapped)
            wrapped.save_pretrained(folder, **(save or {}))
            whole = wrapped.merge_and_unload()
            if base_kind:
                getattr(saved, "model", saved).load_state_dict(getattr(whole, "model", whole).state_dict())
                whole = saved
            merged = {key: value.detach().numpy() for key, value in whole.state_dict().items()}
        return Made(base, folder if name == "default" else folder / name, merged)

    def train(self, model: Any) -> None:
        """Give every trainable parameter another value."""
        generator = self.torch.Generator().manual_seed(11)
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(self.torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    return Maker(tmp_path_factory.mktemp("adapters"))


def check(made: Made) -> Adapter:
    """Assert that the adapter as it was read gives every tensor of PEFT's merge."""
    adapter = made.open()
    result = made.result(adapter)
    assert set(result) <= set(made.merged)
    for name, value in made.merged.items():
        if name not in result:
            assert name == "lm_head.weight"  # tied, and so not in a file
            value, name = made.merged["lm_head.weight"], "model.embed_tokens.weight"
        if name in adapter.low_rank:
            limit = 1e-6 * max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(result[name], value, rtol=1e-6, atol=limit, err_msg=name)
        else:
            np.testing.assert_array_equal(result[name], value, err_msg=name)
    check_copies(adapter, made.base, lambda name: made.base_shard.reader)
    assert not set(adapter.full) & set(adapter.low_rank)
    return adapter


PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5, "^model.layers.0.mlp.up_proj": 6, "proj": 7},
    "alpha_pattern": {"self_attn.[qk]_proj": 3, "up_proj": 1.5, "0.mlp.down_proj": 32},
}


class TestAsPeftMergesIt:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="the usual"),
            pytest.param({"target_modules": "all-linear", "lora_alpha": 32, "lora_dropout": 0.1}, id="all-linear"),
            pytest.param({"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 3}, id="rsLoRA"),
            pytest.param({"target_modules": "all-linear", **PATTERNS}, id="patterns"),
            pytest.param({"target_modules": "all-linear", "use_rslora": True, **PATTERNS}, id="rsLoRA, patterns"),
            pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="lm_head"),
            pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm", "mlp"]}, id="more"),
            pytest.param({"target_modules": ["q_proj", "up_proj"], "bias": "all"}, id="all biases"),
            pytest.param({"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}, id="biases of LoRA"),
            pytest.param({"target_modules": ["embed_tokens", "q_proj"], "r": 6}, id="embedding"),
            pytest.param({"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}, id="embedding and head"),
            pytest.param({"target_modules": ["k_proj"], "name": "second"}, id="another name"),
            pytest.param({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, id="gaussian"),
            pytest.param({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, id="orthogonal"),
            pytest.param({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, id="MiCA"),
            pytest.param({"target_modules": ["q_proj"], "init_lora_weights": False}, id="random"),
        ],
    )
    def test_llama(self, make: Maker, options: dict[str, Any]) -> None:
        check(make(**options))

    def test_the_patterns_of_that_test_apply(self, make: Maker) -> None:
        adapter = make(target_modules="all-linear", **PATTERNS).open()
        found = {name: (one.rank, one.scale) for name, one in adapter.low_rank.items()}
        assert found["model.layers.0.self_attn.q_proj.weight"] == (2, 3 / 2)
        assert found["model.layers.0.self_attn.v_proj.weight"] == (8, 1)
        assert found["model.layers.1.self_attn.k_proj.weight"] == (5, 3 / 5)
        assert found["model.layers.0.mlp.up_proj.weight"] == (6, 1.5 / 6)
        assert found["model.layers.0.mlp.down_proj.weight"] == (8, 32 / 8)

    def test_what_is_full_and_what_is_a_copy(self, make: Maker) -> None:
        adapter = make(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], bias="lora_only").open()
        biases = {f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)}
        assert set(adapter.full) == {"lm_head.weight", *biases}
        assert set(adapter.copies) == {"model.embed_tokens.weight"}
        assert adapter.low_rank["model.embed_tokens.weight"].left_transposed

    def test_saved_embeddings_that_are_modules_to_save_too(self, make: Maker) -> None:
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        made = make(**options, save={"save_embedding_layers": True})
        names = {tensor.name for tensor in made.open().shard.header.tensors}
        assert "base_model.model.lm_head.original_module.weight" in names  # so this is that case
        made.open()
        os.close(os.open(made.folder / "adapter_model.safetensors", os.O_WRONLY | os.O_NONBLOCK))  # no file stays open
        assert set(check(made).full) == {"lm_head.weight", "model.embed_tokens.weight"}

    def test_saved_embeddings_of_a_tied_model(self, make: Maker) -> None:
        made = make(
            target_modules=["q_proj"], save={"save_embedding_layers": True}, shape={"tie_word_embeddings": True}
        )
        assert "lm_head.weight" not in made.base
        assert set(check(made).full) == {"model.embed_tokens.weight"}

    @pytest.mark.parametrize(
        "targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["c_attn", "c_proj", "lm_head"], ["wte", "c_fc"]]
    )
    def test_gpt2_stores_its_weights_transposed(self, make: Maker, targets: list[str]) -> None:
        """The config says fan_in_fan_out false because of lm_head, and attn.c_proj is square."""
        adapter = check(make("gpt2", target_modules=targets))
        for name, one in adapter.low_rank.items():
            assert one.left_transposed == one.right_transposed == (not name.startswith("lm_head"))
        assert "wte" not in targets or "transformer.wte.weight" in adapter.low_rank

    def test_a_base_saved_without_its_head(self, make: Maker) -> None:
        made = make("llama", base_kind="body", target_modules=["q_proj", "up_proj"])
        assert "layers.0.self_attn.q_proj.weight" in made.base
        check(made)

    def test_an_adapter_trained_without_the_head(self, make: Maker) -> None:
        made = make("body", base_kind="llama", target_modules=["q_proj", "up_proj"])
        assert "model.layers.0.self_attn.q_proj.weight" in made.base
        check(made)

    def test_pissa_saved_over_its_residual_is_refused(self, make: Maker) -> None:
        made = make(target_modules=["q_proj"], init_lora_weights="pissa")
        with pytest.raises(CheckpointError, match="init_lora_weights is 'pissa', which may have changed the base"):
            made.open()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, "use_dora is True: DoRA, which rescales"),
            ({"lora_bias": True}, "lora_bias is True: biases of lora_B"),
            ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]: single trained rows"),
            ({"layer_replication": [[0, 2], [0, 1]]}, "layer_replication is .*no checkpoint with sft's shapes"),
            ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]: an activated LoRA"),
        ],
    )
    def test_other_kinds_are_refused(self, make: Maker, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with quiet():
            wrapped = make.peft.get_peft_model(
                make.model("llama"), make.peft.LoraConfig(target_modules=["q_proj"], **options)
            )
            wrapped.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(str(tmp_path), {})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **dict.fromkeys(options)}))
        if {"use_dora", "lora_bias", "trainable_token_indices"} & set(options):  # the names of the tensors show it too
            with pytest.raises(CheckpointError, match=r"'base_model\.model\.model\..*which is not read; merge"):
                open_adapter(str(tmp_path), {})

    def test_the_wrong_base_shows_in_the_copy_of_an_embedding(self, make: Maker) -> None:
        made = make(target_modules=["embed_tokens"])
        adapter = made.open()
        other = make(target_modules=["q_proj"], shape={"num_hidden_layers": 1, "initializer_range": 0.5})
        with pytest.raises(
            CheckpointError, match=r"embed_tokens\.base_layer\.weight', a copy of the base's tensor, differs from"
        ):
            check_copies(adapter, other.base, lambda name: other.base_shard.reader)


A, B = "base_model.model.model.layers.0.q_proj.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_B.weight"
BASE = {
    "model.layers.0.q_proj.weight": ("BF16", (12, 8)),
    "model.layers.0.o_proj.weight": ("BF16", (8, 8)),
    "model.embed_tokens.weight": ("BF16", (20, 8)),
    "model.norm.weight": ("BF16", (8,)),
}
FACTORS: dict[str, tuple[str, tuple[int, ...]]] = {A: ("F32", (2, 8)), B: ("F32", (12, 2))}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/where"}


def base_tensors(**other: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, 0, 0) for name, (dtype, shape) in {**BASE, **other}.items()}


def write(
    folder: Path,
    shapes: dict[str, tuple[str, tuple[int, ...]]] | None = None,
    config: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    tensors = {**random_tensors(FACTORS if shapes is None else shapes, 1), **(data or {})}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return str(folder)


def refused(folder: str, message: str, base: dict[str, TensorInfo] | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(folder, base_tensors() if base is None else base)
    assert folder in str(caught.value)


class TestByHand:
    def test_the_least(self, tmp_path: Path) -> None:
        adapter = open_adapter(write(tmp_path), base_tensors())
        one = adapter.low_rank["model.layers.0.q_proj.weight"]
        assert (one.left.name, one.right.name, one.left_transposed, one.right_transposed) == (B, A, False, False)
        assert (one.scale, one.rank) == (2.0, 2)
        assert (adapter.path, adapter.full, adapter.copies) == (str(tmp_path), {}, {})
        assert adapter.config["base_model_name_or_path"] == "some/where"

    def test_rank_stabilised(self, tmp_path: Path) -> None:
        adapter = open_adapter(write(tmp_path, config={"use_rslora": True, "lora_alpha": 0.5}), base_tensors())
        assert adapter.low_rank["model.layers.0.q_proj.weight"].scale == 0.5 / math.sqrt(2)

    def test_keys_with_the_adapter_s_name(self, tmp_path: Path) -> None:
        shapes = {name.replace(".weight", ".mine.weight"): found for name, found in FACTORS.items()}
        embedding = {
            "base_model.model.model.embed_tokens.lora_embedding_A.mine": ("F32", (2, 20)),
            "base_model.model.model.embed_tokens.lora_embedding_B.mine": ("F32", (8, 2)),
            "base_model.model.model.norm.modules_to_save.mine.weight": ("F32", (8,)),
        }
        adapter = open_adapter(write(tmp_path, {**shapes, **embedding}), base_tensors())
        assert set(adapter.low_rank) == {"model.layers.0.q_proj.weight", "model.embed_tokens.weight"}
        assert set(adapter.full) == {"model.norm.weight"}

    def test_whole_tensors_alone(self, tmp_path: Path) -> None:
        adapter = open_adapter(write(tmp_path, {"base_model.model.model.norm.weight": ("F32", (8,))}), base_tensors())
        assert adapter.full["model.norm.weight"].name == "base_model.model.model.norm.weight"
        assert not adapter.low_rank

    @pytest.mark.parametrize(
        ("trained", "saved"),
        [
            ("model.layers.0.q_proj", "layers.0.q_proj"),
            ("layers.0.q_proj", "model.layers.0.q_proj"),
            ("transformer.h.0.attn", "h.0.attn"),
            ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
            ("language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
            ("lm_head", "language_model.lm_head"),
            ("model.language_model.layers.0.q_proj", "model.layers.0.q_proj"),
            ("model.visual.blocks.0.qkv", "visual.blocks.0.qkv"),
            ("model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ],
    )
    def test_prefixes(self, tmp_path: Path, trained: str, saved: str) -> None:
        shapes = {f"base_model.model.{trained}.lora_{half}.weight": FACTORS[key] for half, key in (("A", A), ("B", B))}
        base = {f"{saved}.weight": TensorInfo(f"{saved}.weight", "F32", (12, 8), 0, 0)}
        assert list(open_adapter(write(tmp_path, shapes), base).low_rank) == list(base)

    @pytest.mark.parametrize("said", [False, True])
    def test_a_square_weight_is_stored_as_the_config_says(self, tmp_path: Path, said: bool) -> None:
        shapes = {key.replace("q_proj", "o_proj"): ("F32", (2, 8) if key == A else (8, 2)) for key in FACTORS}
        adapter = open_adapter(write(tmp_path, shapes, {"fan_in_fan_out": said}), base_tensors())
        assert adapter.low_rank["model.layers.0.o_proj.weight"].left_transposed is said

    def test_a_square_weight_of_which_nothing_tells(self, tmp_path: Path) -> None:
        square = {key.replace("q_proj", "o_proj"): ("F32", (2, 8) if key == A else (8, 2)) for key in FACTORS}
        folder = write(tmp_path, {**FACTORS, **square}, {"fan_in_fan_out": True})
        refused(folder, "'model.layers.0.o_proj.weight' is square, .*: fan_in_fan_out is True, but not for all modules")

    def test_what_counts_as_an_adapter(self, tmp_path: Path) -> None:
        assert not is_adapter(str(tmp_path / "nothing"))
        folder = write(tmp_path / "one")
        assert is_adapter(folder)
        for name in ("model.safetensors", "pytorch_model.bin.index.json"):
            (tmp_path / "one" / name).write_bytes(b"")
            assert not is_adapter(folder)
            (tmp_path / "one" / name).unlink()
        (tmp_path / "one" / "adapter_config.json").unlink()
        assert not is_adapter(folder)

    def test_a_pickled_file_is_read_as_well(self, tmp_path: Path) -> None:
        import torch

        folder = write(tmp_path)
        shard = open_safetensors(str(tmp_path / "adapter_model.safetensors"))
        os.unlink(shard.path)
        zeros = {tensor.name: torch.zeros(tensor.shape) for tensor in shard.header.tensors}
        torch.save(zeros, tmp_path / "adapter_model.bin")
        adapter = open_adapter(folder, base_tensors())
        assert adapter.shard.path == str(tmp_path / "adapter_model.bin")
        assert set(adapter.low_rank) == {"model.layers.0.q_proj.weight"}

    def test_no_weights_and_no_config(self, tmp_path: Path) -> None:
        folder = write(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        refused(folder, "no adapter_model.safetensors; download")
        (tmp_path / "adapter_model.safetensors").symlink_to("nowhere")
        refused(folder, "adapter_model.safetensors: a broken link")
        (tmp_path / "adapter_config.json").unlink()
        refused(folder, "adapter_config.json: no such file")


class TestRefusedConfigs:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"peft_type": "LOHA"},
                "peft_type is 'LOHA', but only 'LORA' is read; merge it with PEFT's merge_and_unload",
            ),
            ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
            ({"peft_type": None}, "peft_type is None"),
            ({"target_parameters": ["experts.w"]}, r"target_parameters has 'experts.w': LoRA of a parameter"),
            ({"use_qalora": True}, "use_qalora is True"),
            ({"megatron_config": {"x": 1}}, "megatron_config is {'x': 1}"),
            ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', .*convert the"),
            ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
            ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
            ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
            ({"use_next_lora": True}, "use_next_lora is True, which is not known here"),
            ({"enable_lora": [True, False]}, r"enable_lora is \[True, False\], which is not known here"),
            ({"r": 0}, "r is 0, but a whole number over 0 is expected"),
            ({"r": None}, "r is None"),
            ({"r": 2.5}, "r is 2.5"),
            ({"r": True}, "r is True"),
            ({"lora_alpha": "4"}, "lora_alpha is '4', but a number is expected"),
            ({"lora_alpha": math.inf}, "lora_alpha is inf"),
            ({"lora_alpha": math.nan}, "lora_alpha is nan"),
            ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], but an object is expected"),
            ({"rank_pattern": {"q_proj": "8"}}, r"rank_pattern\['q_proj'\] is '8'"),
            ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] is None"),
            ({"alpha_pattern": {"q_(proj": 2}}, r"alpha_pattern has 'q_\(proj', which is no regular expression"),
            ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list of names"),
            ({"modules_to_save": ["score", "norm"]}, "modules_to_save has 'norm', which sft has too"),
        ],
    )
    def test_named_with_their_value(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        refused(write(tmp_path, config=config), message)

    @pytest.mark.parametrize(
        "config",
        [
            {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
            {"init_lora_weights": None, "rank_pattern": None, "alpha_pattern": None},
            {"corda_config": {"corda_method": "ipm"}},  # left over from a conversion
            {"some_size": 16, "some_mode": "auto", "use_something": False, "something_config": None},
            {"modules_to_save": ["classifier", "score"]},
        ],
    )
    def test_and_these_are_read(self, tmp_path: Path, config: dict[str, Any]) -> None:
        assert len(open_adapter(write(tmp_path, config=config), base_tensors()).low_rank) == 1


class TestRefusedFiles:
    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({}, "neither factors nor whole tensors in it"),
            ({A: ("F32", (2, 8))}, r"lora_A.weight' is there, but 'base_model.*q_proj' has no lora_B: half a delta"),
            ({B: ("F32", (12, 2))}, "has no lora_A"),
            (
                {A: ("I64", (2, 8)), B: ("F32", (12, 2))},
                r"lora_A.weight' is I64, but factors are one of BF16, F16, F32",
            ),
            ({A: ("F32", (0,)), B: ("F32", (12, 2))}, r"lora_A.weight' is \[0\]: no matrix; DeepSpeed"),
            ({A: ("F32", (2, 8, 1, 1)), B: ("F32", (12, 2, 1, 1))}, r"is \[2, 8, 1, 1\]: LoRA of a convolution"),
            (
                {A: ("F32", (4, 8)), B: ("F32", (12, 4))},
                r"lora_A.weight' \[4, 8\] has the rank 4, but .*adapter_config.json gives .* the rank 2",
            ),
            ({A: ("F32", (2, 8)), B: ("F32", (12, 3))}, r"lora_B.weight' \[12, 3\] has the rank 3"),
            (
                {A: ("F32", (2, 9)), B: ("F32", (12, 2))},
                r"lora_B.weight' \[12, 2\] times .*lora_A.weight' \[2, 9\] is a \[12, 9\], but sft's "
                r"'model.layers.0.q_proj.weight' is \[12, 8\]",
            ),
            (
                {key.replace(".weight", f".{name}.weight"): FACTORS[key] for key in FACTORS for name in ("one", "two")},
                "lora_A.one.weight' and .*lora_A.two.weight' both change sft's .*two adapters in one file",
            ),
            (
                {**FACTORS, "base_model.model.model.layers.0.q_proj.lora_E": ("F32", (2, 1))},
                "'base_model.model.model.layers.0.q_proj.lora_E': neither lora_A nor lora_B",
            ),
            (
                {**FACTORS, "base_model.model.score.weight": ("F32", (2, 8)), "other": ("F32", (2,))},
                "2 tensors of the adapter that sft does not have: base_model.model.score.weight, other; is sft the "
                r"checkpoint that the adapter was trained from \(its config says 'some/where'\)\?$",
            ),
            (
                {
                    f"base_model.model.model.layers.{i}.{key[-20:]}": FACTORS[key]
                    for i in range(1, 8)
                    for key in FACTORS
                },
                r"7 modules of the adapter that sft does not have: model.layers.1.*, and 2 more; is sft",
            ),
            (
                {"base_model.model.lm_head.lora_A.weight": ("F32", (2, 8)), "lm_head.lora_B.weight": ("F32", (2, 8))},
                "half a delta",
            ),
            (
                {
                    "base_model.model.lm_head.lora_A.weight": ("F32", (2, 8)),
                    "base_model.model.lm_head.lora_B.weight": ("F32", (20, 2)),
                },
                "1 module of the adapter that sft does not have: lm_head; .*a head that sft ties to its embedding",
            ),
            (
                {
                    "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (2, 8)),
                    "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", (20, 2)),
                },
                r"is a \[20, 8\], but sft's 'model.embed_tokens.weight' is \[20, 8\], and the transpose of the prod",
            ),
            (
                {
                    "base_model.model.model.embed_tokens.base_layer.weight": ("F32", (24, 8)),
                    "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (2, 20)),
                    "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", (8, 2)),
                },
                r"a copy of the base's tensor, is F32 \[24, 8\], but sft's .* is BF16 \[20, 8\]",
            ),
        ],
    )
    def test_named_with_what_is_wrong(self, tmp_path: Path, shapes: dict[str, Any], message: str) -> None:
        refused(write(tmp_path, shapes), message)

    def test_a_base_that_is_quantised(self, tmp_path: Path) -> None:
        base = base_tensors(**{"model.layers.0.q_proj.weight": ("I8", (12, 8))})
        refused(write(tmp_path), "is a factor for sft's 'model.layers.0.q_proj.weight', which is I8", base)

    def test_two_whole_tensors_for_one_that_differ(self, tmp_path: Path) -> None:
        name = "base_model.model.model.norm"
        data = {
            f"{name}.weight": ("F32", (8,), bytes(32)),
            f"{name}.modules_to_save.weight": ("F32", (8,), bytes(31) + b"?"),
        }
        refused(write(tmp_path / "one", data=data), "both stand for sft's 'model.norm.weight', and differ")
        data[f"{name}.modules_to_save.weight"] = ("F32", (2, 4), bytes(32))
        refused(write(tmp_path / "three", data=data), "both stand for sft's 'model.norm.weight', and differ")
        data[f"{name}.modules_to_save.weight"] = data[f"{name}.weight"]
        assert set(open_adapter(write(tmp_path / "two", data=data), base_tensors()).full) == {"model.norm.weight"}

    def test_a_head_that_is_no_copy_of_the_embedding(self, tmp_path: Path) -> None:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "base_model.model.model.embed_tokens.weight": ("F32", (20, 8)),
            "base_model.model.lm_head.weight": ("F32", (20, 8)),
        }
        refused(
            write(tmp_path, shapes), "1 tensor of the adapter that sft does not have: base_model.model.lm_head.weight"
        )


@pytest.mark.parametrize(
    ("dtype", "mine", "equal"), [("BF16", "F32", True), ("F32", "BF16", True), ("F32", "F16", False)]
)
def test_a_copy_in_another_dtype_is_compared_rounded(tmp_path: Path, dtype: str, mine: str, equal: bool) -> None:
    import ml_dtypes

    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
    values = np.random.default_rng(3).standard_normal((20, 8)).astype(np.float32).astype(kinds[dtype])
    other = values.astype(kinds[mine]) if equal else values.astype(np.float32).astype(kinds[mine]) * 2
    base = tmp_path / "base.safetensors"
    base.write_bytes(safetensors_bytes({"model.embed_tokens.weight": (dtype, (20, 8), values.tobytes())}))
    name = "base_model.model.model.embed_tokens"
    shapes = {f"{name}.lora_embedding_A": ("F32", (2, 20)), f"{name}.lora_embedding_B": ("F32", (8, 2))}
    folder = write(tmp_path / "one", shapes, data={f"{name}.base_layer.weight": (mine, (20, 8), other.tobytes())})
    shard = open_safetensors(str(base))
    tensors = {tensor.name: tensor for tensor in shard.header.tensors}
    adapter = open_adapter(folder, tensors)
    with (
        contextlib.nullcontext()
        if equal
        else pytest.raises(CheckpointError, match="a copy of the base's tensor, differs")
    ):
        check_copies(adapter, tensors, lambda name: shard.reader)
