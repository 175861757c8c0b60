"""Whole searches: their files, the models that they judge, and how they stop, continue and refuse."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import PROMPTS, score, search_demo

import expo
from expo import errors
from expo.demo import ALIGNED, SFT
from expo.demo.score import plain_words
from expo.search import search_alpha


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a search that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted") / "search"
    search_demo(out, alpacaeval=True)
    return out


def test_a_search_writes_everything_down(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "replies.jsonl").read_text().splitlines()]
    assert [line["alpha"] for line in lines] == [alpha for alpha in (0.0, 0.2, 0.5) for _ in PROMPTS]
    assert {line["prompt"] for line in lines} == set(PROMPTS)
    assert all(line["reward"] == plain_words(line["reply"]) for line in lines)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for row in summary["rows"]:
        own = [line for line in lines if line["alpha"] == row["alpha"]]
        assert row["reward"] == pytest.approx(np.mean([line["reward"] for line in own]))
        assert row["tokens"] == pytest.approx(np.mean([line["new_tokens"] for line in own]))
        assert row["unfinished"] == pytest.approx(np.mean([not line["finished"] for line in own]))
    best = max(summary["rows"], key=lambda row: row["reward"])
    assert summary["best"] == best["alpha"]
    assert (uninterrupted / "plot.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((uninterrupted / "alpacaeval-0.5.json").read_text())
    assert [each["instruction"] for each in written] == PROMPTS
    assert {each["generator"] for each in written} == {"aligned-expo-0.5"}


def test_alphas_are_those_of_merged_models(uninterrupted: Path, tmp_path: Path) -> None:
    """A search over the merged model alone has at alpha 0 the replies of the pair at alpha 0.5."""
    expo.merge(SFT, ALIGNED, 0.5, tmp_path / "merged")
    search_alpha(
        SFT, tmp_path / "merged", PROMPTS, score, [], tmp_path / "out", max_new_tokens=12, batch_size=5, device="cpu"
    )
    merged = [json.loads(line)["reply"] for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (uninterrupted / "replies.jsonl").read_text().splitlines()]
    assert merged == [line["reply"] for line in lines if line["alpha"] == 0.5]
    assert merged != [line["reply"] for line in lines if line["alpha"] == 0]


@pytest.mark.parametrize("torn", [False, True])
def test_a_search_that_is_stopped_continues_to_the_same_replies(
    uninterrupted: Path, tmp_path: Path, torn: bool
) -> None:
    calls = 0

    def stop(prompts: list[str], texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return score(prompts, texts)

    # A search that continues compares the names of the rewards.
    stop.__module__, stop.__qualname__ = score.__module__, score.__qualname__
    with pytest.raises(KeyboardInterrupt):
        search_demo(tmp_path / "out", stop)
    path = tmp_path / "out" / "replies.jsonl"
    kept = path.read_bytes()
    assert 0 < kept.count(b"\n") < 36
    if torn:  # a kill may leave a line and a half of a batch
        path.write_bytes(kept[: kept.rindex(b"\n", 0, len(kept) - 1) - 30])
    result = search_demo(tmp_path / "out")
    assert path.read_bytes() == (uninterrupted / "replies.jsonl").read_bytes()
    assert result.best == json.loads((uninterrupted / "summary.json").read_text())["best"]
    before = path.stat().st_mtime_ns
    search_demo(tmp_path / "out", alphas=[0.5])  # no reply is missing, and all alphas are compared still
    assert path.stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]) == 3


def test_another_search_is_refused_and_the_difference_named(uninterrupted: Path, tmp_path: Path) -> None:
    before = (uninterrupted / "replies.jsonl").read_bytes()
    differences: dict[str, dict[str, Any]] = {
        "max_new_tokens was 12 and is now 13": {"max_new_tokens": 13},
        "seed was 0 and is now 1": {"seed": 1},
        "prompts was .12, SHA-256": {"prompts": PROMPTS[:5]},
        "reward was .*score. and is now .*len": {"reward": len},
        "temperature was 0.7 and is now 1.0": {"sampling": {"temperature": 1.0}},
    }
    for message, change in differences.items():
        with pytest.raises(errors.OutputError, match=message):
            search_demo(uninterrupted, **change)
    assert (uninterrupted / "replies.jsonl").read_bytes() == before
    (tmp_path / "notes.txt").write_text("other")
    with pytest.raises(errors.OutputError, match=r"the folder has notes\.txt but no settings\.json"):
        search_demo(tmp_path)


def test_without_matplotlib_there_is_no_plot_and_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    search_demo(tmp_path / "out", alphas=[], prompts=PROMPTS[:2], quiet=False)
    assert "no plot.png: pip install matplotlib" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["replies.jsonl", "settings.json", "summary.json"]


def test_auto_follows_the_rewards(tmp_path: Path) -> None:
    def short(prompts: list[str], texts: list[str]) -> list[float]:
        return [-float(len(text.split())) for text in texts]

    result = search_demo(tmp_path / "out", short, "auto", budget=3, max_new_tokens=10)
    alphas = [row.alpha for row in result.rows]
    assert len(alphas) <= 4
    assert {0.0, 0.5} <= set(alphas)
    again = search_demo(tmp_path / "out", short, "auto", budget=3, max_new_tokens=10)
    assert again == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one string"),
        ({"alphas": "all"}, 'numbers or "auto"'),
        ({"alphas": [math.inf]}, "finite"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"sampling": {"top_q": 1}}, "top_q"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"device": "tpu"}, "`device` must be"),
        ({"keep": "cloud"}, "`keep` must be"),
        ({"reward": 3}, "reward must be"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.UsageError, match=message):
        search_demo(tmp_path / "out", **change)


def test_an_adapter_and_a_bare_file_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = next(ALIGNED.glob("*.safetensors"))
    with pytest.raises(errors.CheckpointError, match="give the folder"):
        search_alpha(file, file, PROMPTS, score, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
