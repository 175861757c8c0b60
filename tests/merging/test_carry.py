"""The files that an output gets with and without --carry: in the plan, the card, a resumed merge, and from the hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import random_tensors, write_folder
from hub_client import Client
from hub_server import files_of, serve

import expo
from expo.fast import main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "expo" / "demo"
RUBBISH = (
    "latest", "zero_to_fp32.py", "run.sh", "nohup.out", "debug.log", "events.out.tfevents.17", "model.safetensors.bak",
    "core.4711", "trainer_log.jsonl", "training_args.json", "wandb/run-1/files/code/train.py", "predictions.jsonl",
    "training_loss.png",
)  # fmt: skip


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """Make a training folder of the demo's aligned."""
    folder = Path(shutil.copytree(DEMO / "aligned", tmp_path / "aligned"))
    for name in RUBBISH:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def run(aligned: Path, *words: object) -> int:
    return main(["--sft", str(DEMO / "sft"), "--aligned", str(aligned), "--alpha", "0.3", *map(str, words)])


def test_of_a_training_folder_only_the_model_comes_along(aligned: Path, tmp_path: Path) -> None:
    merged = expo.merge(DEMO / "sft", aligned, 0.3, tmp_path / "out")
    expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, tmp_path / "plain")
    assert set(files_of(tmp_path / "out")) == set(files_of(tmp_path / "plain"))
    assert {name for name, _ in merged.left_out} >= set(RUBBISH)


def test_further_files_and_the_command_that_names_them(
    aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(aligned, "--out", out, "--carry", "*.png", "--carry", "wandb/*", "--digest") == 0
    assert {"training_loss.png", "wandb/run-1/files/code/train.py"} < set(files_of(out))
    assert "run.sh" not in files_of(out)
    card = (out / "README.md").read_text()
    assert "--alpha 0.3 --carry '*.png' --carry 'wandb/*'\n" in card
    assert "- `--carry`: `*.png wandb/*`\n" in card
    assert "training_loss.png" in (out / "SHA256SUMS").read_text()
    assert "left out run.sh: not a file that a model is loaded with" in capsys.readouterr().out


def test_the_plan_lists_every_file(aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(aligned, "--plan", "--carry", "run.sh") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "carry        run.sh" in lines
    assert "leave out    debug.log: not a file that a model is loaded with" in lines
    listed = {line.split()[-1] for line in lines if line.startswith("carry ")}
    left_out = {line.removeprefix("leave out").partition(":")[0].strip() for line in lines if line.startswith("leave ")}
    assert listed | left_out >= set(RUBBISH)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.pdf", "--carry '*.pdf' matches no file beside the weights of "),
        ("SHA*", "matches no file"),
        ("model.safetensors.index.json", "matches no file"),
        (".*", ".hidden cannot be carried: hidden; leave the pattern out"),
        ("secret", "is a link out of its folder"),
    ],
)
@pytest.mark.parametrize("plan", [["--plan"], []], ids=["plan", "merge"])
def test_a_pattern_that_cannot_be_followed(
    aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, message: str, plan: list[str]
) -> None:
    (aligned / ".hidden").write_text("x")
    (tmp_path / "elsewhere").write_text("x")
    (aligned / "secret").symlink_to(tmp_path / "elsewhere")
    assert run(aligned, "--out", tmp_path / "out", "--carry", pattern, *plan) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_that_nobody_asked_for_is_left_out(aligned: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (aligned / "secret").symlink_to(tmp_path / "elsewhere")
    merged = expo.merge(DEMO / "sft", aligned, 0.3, tmp_path / "out")
    assert "secret" in dict(merged.left_out)


def test_a_bare_file_takes_nothing_along(tmp_path: Path) -> None:
    tensors = random_tensors({"w": ("BF16", (8, 8))}, 1)
    pair = [write_folder(tmp_path / name, tensors) / "model.safetensors" for name in ("sft", "aligned")]
    with pytest.raises(expo.UsageError, match="is one bare file"):
        expo.merge(*pair, 0.3, tmp_path / "out.safetensors", carry=["*.png"])


def test_one_pattern_instead_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(expo.UsageError, match=r"^`carry` must be a list of patterns"):
        expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, tmp_path / "out", carry="*.png")


def test_a_merge_that_carries_other_files_is_another_one(aligned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    staged = tmp_path / ".out.expo-staging"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.merging.coordinator.Coordinator, "complete", fail)
        with pytest.raises(expo.OutputError):
            expo.merge(DEMO / "sft", aligned, 0.3, out, carry=["run.sh"])
    with pytest.raises(expo.OutputError, match=r'--carry was \["run.sh"\], is \[\]'):
        expo.merge(DEMO / "sft", aligned, 0.3, out, resume=True)
    assert staged.is_dir()
    assert expo.merge(DEMO / "sft", aligned, 0.3, out, resume=True, carry=["run.sh"]).resumed
    assert (out / "run.sh").exists()


# --- without a tokenizer ----------------------------------------------------------------------------------------------

WARNING = (
    "aligned has no tokenizer, so the output has none; sft has one: copy tokenizer.json and tokenizer_config.json from "
    f"{DEMO / 'sft'} into the output if aligned was trained with it"
)


def test_aligned_without_a_tokenizer_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aligned = Path(shutil.copytree(DEMO / "aligned", tmp_path / "aligned"))
    for path in aligned.glob("tokenizer*"):
        path.unlink()
    assert run(aligned, "--plan") == 0
    assert f"note: {WARNING}\n" in capsys.readouterr().out
    assert run(aligned, "--out", tmp_path / "out") == 0
    assert f"expo: warning: {WARNING}\n" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer" not in card
    assert "AutoModelForCausalLM.from_pretrained(name" in card


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [0, 2])
def test_no_file_of_an_output_says_where_the_inputs_were(tmp_path: Path, shards: int) -> None:
    place = tmp_path / "home" / "secret-project"
    shapes = {"a": ("BF16", (8, 8)), "b": ("BF16", (8, 8)), "c": ("BF16", (4,))}
    sft = write_folder(place / "sft", random_tensors({**shapes, "c": ("BF16", (6,)), "old": ("F32", (2,))}, 1), shards)
    aligned = write_folder(place / "my aligned", random_tensors({**shapes, "new": ("F32", (2,))}, 2), shards)
    options = (
        "--on-unpaired",
        "aligned",
        "--on-mismatch",
        "aligned",
        "--alpha-for",
        "b=0",
        "--digest",
        "--dtype",
        "fp16",
    )
    for pair in ((sft, aligned), (f"{sft}/", os.path.relpath(aligned))):
        out = tmp_path / "out"
        words = ["--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3", "--out", str(out), *options]
        assert main([*words, "--overwrite"]) == 0
        found = files_of(out)
        assert len(found) >= 4
        for name, data in found.items():
            assert b"secret-project" not in data, name
        assert "--sft sft --aligned 'my aligned' --alpha 0.3 " in found["README.md"].decode()


def test_a_snapshot_of_the_hub_s_cache_is_named_by_its_id(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    sft = write_folder(tmp_path / "sft", random_tensors({"w": ("BF16", (8, 8))}, 1))
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    write_folder(snapshot, random_tensors({"w": ("BF16", (8, 8))}, 2))
    expo.merge(sft, snapshot, 0.3, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--sft sft --aligned org/name@{commit} --alpha 0.3\n" in card
    assert str(tmp_path) not in card


def fail(*_: object) -> None:
    raise expo.OutputError("the disk is full")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Client]:
    """Yield a hub with a pair whose aligned is a training folder."""
    tensors = {"w": ("BF16", (8, 8))}
    files = files_of(write_folder(tmp_path / "sft", random_tensors(tensors, 1)))
    with serve() as server:
        server.add("org/sft", files)
        extra = dict.fromkeys((*RUBBISH, "LICENSE"), b"x")
        server.add("org/aligned", {**files_of(write_folder(tmp_path / "b", random_tensors(tensors, 2))), **extra})
        client = Client(server.endpoint, tmp_path / "home")
        yield client
        with contextlib.suppress(KeyError):
            server.repos.clear()


def test_from_the_hub_only_what_comes_along_is_fetched(hub: Client) -> None:
    plain, carrying = hub.plan(("org/sft", "org/aligned"), ("org/sft", "org/aligned", "--carry", "*.png"))
    assert plain["carried"] == ["LICENSE", "config.json"]
    assert plain["left_out"] == {}
    assert carrying["carried"] == ["LICENSE", "config.json", "training_loss.png"]
    (snapshot,) = (hub.home / "hf/hub/models--org--aligned/snapshots").iterdir()
    assert set(os.listdir(snapshot)) == {"LICENSE", "config.json", "training_loss.png"}
    assert json.loads((snapshot / "config.json").read_text())
