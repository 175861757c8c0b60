"""The embedded pair is small and loads, and the demonstration shows a higher score after the merge."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from searches import quiet_transformers

from expo.demo import ALIGNED, SFT
from expo.demo import __main__ as demonstration
from expo.demo.score import plain_words


@pytest.mark.parametrize("folder", [SFT, ALIGNED], ids=["sft", "aligned"])
def test_pair_is_small_and_loads(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    assert len(list(folder.glob("*.safetensors"))) == 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert 0.9e6 < model.num_parameters() < 1.1e6


def test_score_counts_distinct_short_words() -> None:
    assert plain_words("") == 0.0
    assert plain_words("a cat sat on the mat by me") == 1.0
    assert plain_words("in in in in in in in in") == 1 / 8


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "expo.demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path} exists already" in done.stderr


def test_demo_raises_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A third of the samples is enough, because the gain over aligned is five times its standard error then."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(demonstration, "SAMPLES_PER_PROMPT", 16)
    monkeypatch.setattr(sys, "argv", ["expo.demo", "--alpha", "1", "--out", str(tmp_path / "m")])
    with quiet_transformers():  # It restores the settings that the demonstration changes.
        demonstration.main()
    means = dict(re.findall(r"^ *(sft|aligned|merged).*? (\d\.\d{3}) \+-", capsys.readouterr().out, re.MULTILINE))
    assert float(means["sft"]) < float(means["aligned"]) < float(means["merged"])
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
