"""The paper's pairs: the file agrees with the paper, the table has straight columns, a wrong name gets a hint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from expo.errors import UsageError
from expo.inputs.recipes import Recipe, as_json, recipe, recipes, table

ROOT = Path(__file__).parents[2]
NAMES = [
    "zephyr-7b-alpha",
    "zephyr-7b-beta",
    "starling-lm-7b-alpha",
    "starling-lm-7b-beta",
    "snorkel-mistral-pairrm",
    "llama3-iterative-dpo",
    "internlm2-chat-1.8b",
    "internlm2-chat-7b",
    "internlm2-chat-20b",
    "tulu-2-dpo-7b",
    "tulu-2-dpo-13b",
    "tulu-2-dpo-70b",
]
ALPHAS = [0.3, 0.1, 0.2, 0.5, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
IDS = {  # aligned, sft
    "zephyr-7b-alpha": ("HuggingFaceH4/zephyr-7b-alpha", "HuggingFaceH4/mistral-7b-sft-alpha"),
    "zephyr-7b-beta": ("HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/mistral-7b-sft-beta"),
    "starling-lm-7b-alpha": ("berkeley-nest/Starling-LM-7B-alpha", "openchat/openchat_3.5"),
    "starling-lm-7b-beta": ("Nexusflow/Starling-LM-7B-beta", "openchat/openchat-3.5-0106"),
    "snorkel-mistral-pairrm": ("snorkelai/Snorkel-Mistral-PairRM-DPO", "mistralai/Mistral-7B-Instruct-v0.2"),
    "llama3-iterative-dpo": ("RLHFlow/LLaMA3-iterative-DPO-final", "RLHFlow/LLaMA3-SFT"),
    "internlm2-chat-1.8b": ("internlm/internlm2-chat-1_8b", "internlm/internlm2-chat-1_8b-sft"),
    "internlm2-chat-7b": ("internlm/internlm2-chat-7b", "internlm/internlm2-chat-7b-sft"),
    "internlm2-chat-20b": ("internlm/internlm2-chat-20b", "internlm/internlm2-chat-20b-sft"),
    "tulu-2-dpo-7b": ("allenai/tulu-2-dpo-7b", "allenai/tulu-2-7b"),
    "tulu-2-dpo-13b": ("allenai/tulu-2-dpo-13b", "allenai/tulu-2-13b"),
    "tulu-2-dpo-70b": ("allenai/tulu-2-dpo-70b", "allenai/tulu-2-70b"),
}


def test_names_ids_and_alphas() -> None:
    assert [one.recipe for one in recipes()] == NAMES
    assert [one.alpha for one in recipes()] == ALPHAS
    assert {one.recipe: (one.aligned, one.sft) for one in recipes()} == IDS


@pytest.mark.parametrize(
    ("name", "wins", "controlled", "mtbench"),
    [
        ("zephyr-7b-alpha", (6.7, 10.6), (10.0, 13.6), (6.85, 6.87)),
        ("starling-lm-7b-beta", (26.6, 29.6), (25.8, 26.4), (8.10, 8.18)),
        ("llama3-iterative-dpo", (29.2, 32.7), (36.0, 37.8), (8.08, 8.45)),
        ("internlm2-chat-7b", (20.5, 28.1), (18.3, 22.7), (7.72, 7.80)),
        ("tulu-2-dpo-70b", (15.4, 23.0), (21.2, 25.7), (7.79, 8.03)),
    ],
)
def test_scores(
    name: str, wins: tuple[float, float], controlled: tuple[float, float], mtbench: tuple[float, float]
) -> None:
    assert recipe(name).alpacaeval == {"wr": wins, "lc": controlled}
    assert recipe(name).mtbench == mtbench


def test_types_and_that_every_score_went_up() -> None:
    for one in recipes():
        assert isinstance(one, Recipe)
        assert all(isinstance(text, str) for text in (one.recipe, one.sft, one.aligned))
        assert isinstance(one.alpha, float)
        assert list(one.alpacaeval) == ["wr", "lc"]
        for scores in (*one.alpacaeval.values(), one.mtbench):
            assert [type(score) for score in scores] == [float, float]
            assert isinstance(scores, tuple)
            assert scores[0] < scores[1]


def test_the_file_has_the_fields_and_no_others() -> None:
    entries = json.loads((ROOT / "expo/inputs/recipes.json").read_text(encoding="utf-8"))
    assert all(list(entry) == list(Recipe._fields) for entry in entries)
    assert json.loads(as_json()) == entries


def test_table_lines_up() -> None:
    header, *rows, source = table().splitlines()
    assert len(rows) == len(NAMES)
    assert "2404.16792" in source
    for one, row in zip(recipes(), rows, strict=True):
        assert row.split()[0] == one.recipe
        for heading, cell in [("recipe", one.recipe), ("alpha", str(one.alpha)), ("aligned", one.aligned)]:
            assert row[header.index(heading) :].startswith(cell)
        assert row[header.rindex("sft") :] == one.sft
        for heading, scores in [
            ("LC win rate %", one.alpacaeval["lc"]),
            ("  win rate %", one.alpacaeval["wr"]),
            ("MT-Bench", one.mtbench),
        ]:
            before, arrow, after = row[header.index(heading) :].split()[:3]
            assert (float(before), arrow, float(after)) == (scores[0], "->", scores[1])
    assert len({row.index("->") for row in rows}) == 1
    assert not any(line != line.rstrip() for line in table().splitlines())


def test_a_line_of_the_table() -> None:
    line = next(line for line in table().splitlines() if line.startswith("internlm2-chat-1.8b"))
    assert line.split(maxsplit=2)[:2] == ["internlm2-chat-1.8b", "0.5"]
    assert " 4.0 ->  4.3" in line
    assert " 3.8 ->  5.2" in line
    assert "5.17 -> 5.26" in line


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("zephyr-7b-betta", "zephyr-7b-beta"),
        ("Zephyr-7B-Beta", "zephyr-7b-beta"),
        ("HuggingFaceH4/zephyr-7b-alpha", "zephyr-7b-alpha"),
        ("tulu-2-70b", "tulu-2-dpo-70b"),
        ("internlm2-7b", "internlm2-chat-7b"),
    ],
)
def test_unknown_name_is_met_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(name)
    assert str(caught.value).startswith(f"no recipe {name!r}: did you mean {near}")
    assert str(caught.value).endswith("? python -m expo.fast --list-recipes shows all 12")


@pytest.mark.parametrize("name", ["", "gpt2", "/", "\n"])
def test_a_name_that_is_near_to_none(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(name)
    assert str(caught.value) == f"no recipe {name!r}: python -m expo.fast --list-recipes shows all 12"


def test_no_library_is_imported_for_the_list() -> None:
    code = "import sys, expo.inputs.recipes as r; r.table(); print({'difflib', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
