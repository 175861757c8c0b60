"""The embedded pair is small and loads, and the demonstration shows a higher score after the merge."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expo.demo import ALIGNED, SFT
from expo.demo.score import plain_words

ROOT = Path(__file__).parents[2]


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


def test_demo_raises_the_score(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "expo.demo",
        "--alpha",
        "1",
        "--out",
        str(tmp_path / "m"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    means = dict(re.findall(r"^ *(sft|aligned|merged).*? (\d\.\d{3}) \+-", done.stdout, re.MULTILINE))
    assert float(means["sft"]) < float(means["aligned"]) < float(means["merged"])
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
