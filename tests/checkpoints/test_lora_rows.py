"""LoRA of modules whose weights are rows of one tensor of the files: the bits of the formula, and PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import quiet, read_file, read_folder, safetensors_bytes

import expo
from expo.errors import CheckpointError

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PREFIX = "base_model.model."
MODULES = ["q_proj", "k_proj", "v_proj"]  # in the order of their rows
WIDTH, SCALE = 32, 5 / 2
SMALL = {
    "vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module", params=[MODULES, ["v_proj"], ["k_proj", "q_proj"]], ids=",".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an adapter of some of the modules, and PEFT's merge."""
    folder = tmp_path_factory.mktemp("rows")
    with quiet(), torch.no_grad():
        torch.manual_seed(2)
        model = transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**SMALL))
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
        model.save_pretrained(folder / "base")
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[*request.param, "o_proj"])
        wrapped = peft.get_peft_model(model, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
        wrapped.save_pretrained(folder / "adapter")
        wrapped.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    return np.frombuffer(tensor[2], np.float32).reshape(tensor[1])


def expected_delta(folder: Path, name: str) -> Any:
    """Return the delta of a file's tensor in fp32, each run of rows summed from the left; None without one."""
    stored = {key: array(tensor) for key, tensor in read_file(folder / "adapter_model.safetensors").items()}
    modules = MODULES if name.endswith("Wqkv.weight") else ["o_proj"] if name.endswith("out_proj.weight") else []
    found, delta = False, np.zeros((WIDTH * len(modules), WIDTH), np.float32)
    for number, module in enumerate(modules):
        keys = [next((key for key in stored if f".{module}.lora_{side}." in key), None) for side in "BA"]
        if keys[0] is not None and keys[1] is not None:
            found, (b, a) = True, (stored[keys[0]], stored[keys[1]])
            for k in range(2):
                delta[number * WIDTH : (number + 1) * WIDTH] += b[:, k, None] * a[None, k, :]
    return delta * np.float32(SCALE) if found else None


def test_the_bits_are_those_of_the_formula_and_of_pefts_merge(made: Path, tmp_path: Path) -> None:
    merged = read_folder(made / "merged")
    for alpha in (0.0, 0.3):
        expo.merge(made / "base", made / "adapter", alpha, tmp_path / f"at-{alpha}", verify=True)
        found, changed = read_folder(tmp_path / f"at-{alpha}"), 0
        for name, tensor in read_folder(made / "base").items():
            delta = expected_delta(made / "adapter", name)
            changed += delta is not None
            value = array(tensor) if delta is None else array(tensor) + np.float32(1 + alpha) * delta
            assert found[name] == ("F32", value.shape, value.tobytes()), name
            if not alpha:
                assert np.abs(value - array(merged[name])).max() <= 2e-6, name
        assert changed == 2


def changed_adapter(made: Path, folder: Path, config: dict[str, Any], change: Any) -> Path:
    """Return a copy of the adapter with another config, and with the factors that `change` returns."""
    copy = Path(shutil.copytree(made / "adapter", folder))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    stored = read_file(copy / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").write_bytes(safetensors_bytes(change(stored)))
    return copy


def test_what_does_not_fit_is_refused(made: Path, tmp_path: Path) -> None:
    keys = list(read_file(made / "adapter" / "adapter_model.safetensors"))
    module = next(each for each in MODULES if any(f".{each}." in key for key in keys))

    def shorter(stored: dict[str, Any]) -> dict[str, Any]:
        values = {key: array(each)[:-1] if f"{module}.lora_B" in key else array(each) for key, each in stored.items()}
        return {key: ("F32", value.shape, value.tobytes()) for key, value in values.items()}

    def twice(stored: dict[str, Any]) -> dict[str, Any]:
        return stored | {key.replace(".weight", ".other.weight"): each for key, each in stored.items()}

    several = sum(f".{each}.lora_A." in key for each in MODULES for key in keys) > 1
    cases = [
        ({}, shorter, rf"{module}\.lora_B\.weight' \[31, 2\] .* belongs to 32 rows of sft's .*Wqkv\.weight'"),
        ({}, twice, r"two factors for the same rows of sft's .*: save two adapters apart"),
        ({"r": 3}, dict, r"has the rank 2, but .* the rank 3"),
        *([({"alpha_pattern": {module: 3}}, dict, "differ in scale or dtype, which is not read; merge")] * several),
    ]
    for number, (config, change, message) in enumerate(cases):
        adapter = changed_adapter(made, tmp_path / str(number), config, change)
        with pytest.raises(CheckpointError, match=message):
            expo.merge(made / "base", adapter, 0.3, tmp_path / "out")
