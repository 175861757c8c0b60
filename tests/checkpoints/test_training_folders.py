"""Files and folders that trainers leave: a state dict inside is read, others are refused with a way out that works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import expo

ALPHA = 0.3


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4)}


def merged(sft: Path, aligned: Path, out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    expo.merge(sft, aligned, ALPHA, out, quiet=True)
    return load_file(out)


def expected() -> dict[str, torch.Tensor]:
    sft, aligned = state(1), state(2)
    return {name: a + torch.tensor(ALPHA) * (a - sft[name]) for name, a in aligned.items()}


def assert_expected(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected().items())


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    path = tmp_path / "sft.bin"
    torch.save(state(1), path)
    return path


@pytest.mark.parametrize("holder", ["state_dict", "model", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_inside_of_a_dict(tmp_path: Path, sft: Path, holder: str, legacy: bool) -> None:
    """Lightning and many trainers save the weights beside numbers and the optimizer's state."""
    path = tmp_path / "last.ckpt"
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(6, 4)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(
        {"epoch": 3, "pytorch-lightning_version": "2.5", holder: state(2), "optimizer_states": [optimizer]},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    assert_expected(merged(sft, path, tmp_path / "out.safetensors"))


def test_two_dicts_of_weights_are_refused_and_the_advice_is_right(tmp_path: Path, sft: Path) -> None:
    path = tmp_path / "both.pt"
    torch.save({"model": state(2), "module": state(3)}, path)
    with pytest.raises(expo.CheckpointError, match=r"'model' and 'module'.* torch\.save\(\) that dict alone"):
        expo.merge(sft, path, ALPHA, tmp_path / "out.safetensors")
    torch.save(torch.load(path)["model"], path)
    assert_expected(merged(sft, path, tmp_path / "out.safetensors"))


def refuse(sft: Path, folder: Path, tmp_path: Path) -> str:
    with pytest.raises(expo.CheckpointError) as caught:
        expo.merge(sft, folder, ALPHA, tmp_path / "out", quiet=True)
    text = str(caught.value)
    assert text.startswith(f"{folder}: ")
    assert "\n" not in text
    return text


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    return folder


def test_a_training_run(tmp_path: Path, sft: Path) -> None:
    run = tmp_path / "run"
    for step in (90, 500, 1000):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        torch.save(state(2), run / f"checkpoint-{step}" / "pytorch_model.bin")
    text = refuse(sft, run, tmp_path)
    assert f"such as the last one, {run / 'checkpoint-1000'}; it has 3 of them" in text
    expo.merge(sft, run / "checkpoint-1000", ALPHA, tmp_path / "out", quiet=True)


def test_a_variant_of_the_name(tmp_path: Path, sft: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "variant"
    folder.mkdir()
    save_file(state(2), folder / "model.fp16.safetensors")
    text = refuse(sft, folder, tmp_path)
    assert f"rename {folder / 'model.fp16.safetensors'} to model.safetensors" in text
    shutil.move(folder / "model.fp16.safetensors", folder / "model.safetensors")
    expo.merge(sft, folder, ALPHA, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("zero_to_fp32.py", "latest"), "run python {0}/zero_to_fp32.py {0} {0}-fp32,"),
        (("__0_0.distcp",), "without its .metadata"),
        (("latest_checkpointed_iteration.txt",), "a checkpoint of Megatron"),
        (("iter_0000100/mp_rank_00/model_optim_rng.pt",), "a checkpoint of Megatron"),
        (("train/adapter_config.json", "reference/adapter_config.json"), "give {0}/train as `aligned`"),
        (("consolidated.safetensors", "params.json"), "the names of the model's authors"),
    ],
)
def test_other_folders_are_named(tmp_path: Path, sft: Path, names: tuple[str, ...], words: str) -> None:
    folder = write(tmp_path / "left", *names)
    assert words.format(folder) in refuse(sft, folder, tmp_path)
