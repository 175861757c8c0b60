"""LoRA of fused experts over files with a tensor for each expert: the bits of the formula, and PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoint_files import quiet, read_file, read_folder, safetensors_bytes

import expo
from expo.errors import CheckpointError

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PREFIX = "base_model.model."
EXPERTS = 3
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 6},
    "one parameter": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "r": 3},
    "patterns": {
        "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        "use_rslora": True, "rank_pattern": {"experts.down_proj": 1}, "alpha_pattern": {"gate_up_proj": 5},
    },
}  # fmt: skip


class Made(NamedTuple):
    """The folders of a base and an adapter, the scales of PEFT's wrappers, and PEFT's merge."""

    base: Path
    adapter: Path
    scales: dict[str, float]
    merged: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("experts")
    with quiet():
        torch.manual_seed(2)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05)
        model.save_pretrained(folder / "base")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**KINDS[request.param]))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        wrapped.save_pretrained(folder / "adapter")
        scales = {
            name: float(module.scaling["default"])
            for name, module in wrapped.named_modules()
            if isinstance(getattr(module, "scaling", None), dict)
        }
        wrapped.merge_and_unload().save_pretrained(folder / "merged")
    return Made(folder / "base", folder / "adapter", scales, read_folder(folder / "merged"))


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    return np.frombuffer(tensor[2], np.float32).reshape(tensor[1])


def expected_delta(made: Made, name: str) -> Any:
    """Return the delta of a file's tensor in fp32, summed from the left; 0 without one."""
    stored = {key: array(tensor) for key, tensor in read_file(made.adapter / "adapter_model.safetensors").items()}
    head, is_expert, tail = name.partition(".experts.")
    if not is_expert:
        module = PREFIX + name.removesuffix(".weight")
        b, a = (stored.get(f"{module}.lora_{side}.weight") for side in "BA")
        pairs = [] if b is None or a is None else [(b, a, made.scales[module])]
    else:
        expert, part, _ = tail.split(".")
        out = {"gate_proj": 40, "up_proj": 40, "down_proj": 32}[part]
        rows = {"gate_proj": slice(0, 20), "up_proj": slice(20, 40), "down_proj": slice(0, 32)}[part]
        pairs = []
        for module in (f"{PREFIX}{head}.experts", f"{PREFIX}{head}.experts.base_layer"):
            b, a = stored.get(f"{module}.lora_B.weight"), stored.get(f"{module}.lora_A.weight")
            if a is not None and b is not None and len(b) == out:
                a = a.reshape(EXPERTS, -1, a.shape[1])[int(expert)]
                b = b.reshape(out, -1, EXPERTS)[rows, :, int(expert)]
                pairs.append((b, a, made.scales[module]))
    if not pairs:
        return None
    ((b, a, scale),) = pairs
    delta = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for k in range(a.shape[0]):
        delta += b[:, k, None] * a[None, k, :]
    return delta * np.float32(scale)


def test_the_bits_are_those_of_the_formula_and_of_pefts_merge(made: Made, tmp_path: Path) -> None:
    for alpha in (0.0, 0.3):
        result = expo.merge(made.base, made.adapter, alpha, tmp_path / f"at-{alpha}", verify=True)
        found, changed = read_folder(tmp_path / f"at-{alpha}"), 0
        for name, tensor in read_folder(made.base).items():
            delta = expected_delta(made, name)
            changed += delta is not None
            value = array(tensor) if delta is None else array(tensor) + np.float32(1 + alpha) * delta
            assert found[name] == ("F32", value.shape, value.tobytes()), name
            if not alpha:
                assert np.abs(value - array(made.merged[name])).max() <= 2e-6, name
        assert result.extrapolated == (changed if alpha else 0)
        assert changed >= EXPERTS


def test_two_adapters_of_experts(made: Made, tmp_path: Path) -> None:
    """The same adapter on both sides leaves no difference."""
    expo.merge(made.base, made.adapter, 0, tmp_path / "merged")
    twin = shutil.copytree(made.adapter, tmp_path / "twin")
    expo.merge(made.adapter, twin, 0.7, tmp_path / "out", base=made.base, adapter_over="base")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "merged")


def changed_adapter(made: Made, folder: Path, config: dict[str, Any], cut: str = "") -> Path:
    """Return a copy of the adapter with another config; factors with `cut` in their names lose a row and a column."""
    copy = Path(shutil.copytree(made.adapter, folder / "adapter"))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    stored = read_file(copy / "adapter_model.safetensors")
    for key in [key for key in stored if cut and cut in key]:
        value = array(stored[key])[:-1, :-1]
        stored[key] = "F32", value.shape, value.tobytes()
    (copy / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    return copy


def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path) -> None:
    own = json.loads((made.adapter / "adapter_config.json").read_text())["target_parameters"]
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"target_parameters": [*own, "other"]}, "", r"target_parameters has 'other': LoRA of a parameter"),
        ({"rank_pattern": {}, "r": 7}, "", r"is for 3 experts, but .* the rank 7; is it the config"),
        ({}, "experts", r"fits none of the experts' parameters model\.layers\.0\.mlp\.experts\."),
    ]
    for number, (config, cut, message) in enumerate(cases):
        adapter = changed_adapter(made, tmp_path / str(number), config, cut)
        with pytest.raises(CheckpointError, match=message):
            expo.merge(made.base, adapter, 0.3, tmp_path / "out")
