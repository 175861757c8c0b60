"""The command line of the search: alphas, signals, exit codes, and the same replies after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from searches import PROMPTS, command_words

import expo
from expo import errors
from expo.demo import ALIGNED, SFT
from expo.search.__main__ import main, parse_alphas

ROOT = Path(__file__).parents[2]
REWARD = """
import os, signal
from expo.demo.score import plain_words
calls = 0
def reward(prompts, replies):
    global calls
    calls += 1
    if calls == 5 and os.environ.get("STOP"):
        os.kill(os.getpid(), int(os.environ["STOP"]))
    return [plain_words(reply) + len(reply) for reply in replies]
"""


def words_of(folder: Path, module: str, *more: str) -> list[str]:
    """Return the arguments of a search on the demo pair, whose reward sends the signal of $STOP at its fifth call."""
    own = ("--out", str(folder / "out"), "--alphas", "0.5,3", "--max-new-tokens", "12", "--batch-size", "5")
    return command_words((SFT, ALIGNED), folder, PROMPTS, (module, REWARD), *own, *more)


def test_alphas_as_a_range_and_a_list() -> None:
    assert parse_alphas("0.1:0.5:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert parse_alphas("0.1,2.5, 5:7:2") == [0.1, 2.5, 5.0, 7.0]
    for text in ("", "0.1:0.5", "a", "0.1:0.5:0", "1:0:0.1", "0:1:1e-9", "nan", "1:inf:1"):
        with pytest.raises(errors.UsageError, match="--alphas"):
            parse_alphas(text)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from expo.search.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_killed_command_continues_to_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = words_of(tmp_path, "killed_reward")
    command = [sys.executable, "-W", "error", "-m", "expo.search", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STOP": "9", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-9, ""), killed.stderr
    assert "alpha 0: mean reward" in killed.stderr
    path = tmp_path / "out" / "replies.jsonl"
    assert path.read_bytes().count(b"\n") == 17  # without the batch that was being scored
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--merge", "merged"]) == 0
    out, err = capsys.readouterr()
    assert "continuing with 17 replies" in err
    assert "12 prompts are few" in err
    best = json.loads((tmp_path / "out" / "summary.json").read_text())["best"]
    assert best > 0
    assert f"best: alpha {best:g}" in out
    assert f"merged at alpha {best:g} -> merged" in out
    assert main([*arguments, "--quiet", "--out", "uninterrupted"]) == 0
    assert path.read_bytes() == (tmp_path / "uninterrupted" / "replies.jsonl").read_bytes()
    expo.merge(SFT, ALIGNED, best, "again")
    for file in Path("again").glob("*.safetensors"):
        merged, expected = load_file(Path("merged") / file.name), load_file(file)
        assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("own_signals")
def test_exit_codes_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOP", "15")
    assert main(words_of(tmp_path, "stopped_reward", "--quiet")) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "replies are kept in" in err
    monkeypatch.delenv("STOP")
    assert main(words_of(tmp_path, "stopped_reward", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.endswith("%")]) == 3
    assert f"merge: python -m expo.fast --sft {SFT} --aligned {ALIGNED} --alpha" in out
    assert all(line.startswith("expo: warning: ") for line in err.splitlines())
    assert main(words_of(tmp_path, "stopped_reward", "--seed", "1")) == 4
    assert main(words_of(tmp_path, "stopped_reward", "--merge", str(tmp_path))) == 4
    assert main([*words_of(tmp_path, "stopped_reward")[2:]]) == 2
    assert main([*words_of(tmp_path, "stopped_reward"), "--sft", str(tmp_path / "nowhere")]) == 3
    assert main([*words_of(tmp_path, "stopped_reward"), "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
