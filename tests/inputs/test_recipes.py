"""Public pairs: the file agrees with its sources, the table has straight columns, a wrong name gets a hint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import Client
from hub_server import Hub, Repo

import expo
from expo.errors import UsageError
from expo.fast import main
from expo.inputs.recipes import Recipe, as_json, recipe, recipes, table
from expo.inputs.resolve import complete_request

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


FURTHER = {  # alpha, win rates, win rates that are controlled for length
    "zephyr-7b-dpo-full": (0.3, (14.7, 18.0), (17.3, 20.2)),
    "zephyr-5pct": (25, (5.0, 11.5), (9.1, 14.7)),
    "zephyr-10pct": (8, (5.9, 17.9), (10.4, 16.3)),
    "zephyr-20pct": (2.5, (8.6, 22.7), (12.9, 21.3)),
    "zephyr-40pct": (0.5, (12.1, 17.7), (14.6, 16.6)),
    "mistral-7b-sppo": (0.3, (32.2, 35.4), (30.5, 31.8)),
    "llama-3-8b-simpo": (0.3, (40.5, 40.6), (44.7, 45.8)),
}
WITHOUT_ALPHA = {
    "tulu-3-8b-dpo": "allenai/Llama-3.1-Tulu-3-8B-{}",
    "tulu-3-70b-dpo": "allenai/Llama-3.1-Tulu-3-70B-{}",
    "olmo-2-7b-dpo": "allenai/OLMo-2-1124-7B-{}",
    "olmo-2-32b-dpo": "allenai/OLMo-2-0325-32B-{}",
    "olmo-3-7b-dpo": "allenai/Olmo-3-7B-Instruct-{}",
    "olmoe-1b-7b": "",
    "gemma-2-9b-simpo": "",
    "eurus-2-7b-prime": "",
}
OF_PAPER = recipes()[: len(NAMES)]


def test_names_ids_and_alphas() -> None:
    assert [one.recipe for one in recipes()] == [*NAMES, *FURTHER, *WITHOUT_ALPHA]
    assert [one.alpha for one in OF_PAPER] == ALPHAS
    assert {one.recipe: (one.aligned, one.sft) for one in OF_PAPER} == IDS
    assert {one.source for one in OF_PAPER} == {"paper"}


def test_further_alphas_and_scores() -> None:
    for name, (alpha, wins, controlled) in FURTHER.items():
        one = recipe(name)
        assert (one.alpha, one.alpacaeval, one.mtbench) == (alpha, {"wr": wins, "lc": controlled}, None)
        assert one.source == "cards"
        unseen = one.aligned in ("chujiezheng/zephyr_0.05", "chujiezheng/zephyr_0.2", "chujiezheng/zephyr_0.4")
        assert bool(one.note) is unseen


def test_pairs_without_a_published_alpha() -> None:
    for name, pattern in WITHOUT_ALPHA.items():
        one = recipe(name)
        assert (one.alpha, one.alpacaeval, one.mtbench, one.source, one.note) == (None, None, None, "", "")
        assert not pattern or (one.sft, one.aligned) == (pattern.format("SFT"), pattern.format("DPO"))


def test_a_recipe_without_an_alpha_says_what_to_do_and_that_is_right(
    server: Hub, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        expo.merge(recipe="olmoe-1b-7b", out="nowhere")
    assert main(["--recipe", "olmoe-1b-7b", "--plan"]) == 2
    assert "give --alpha, or find the best one" in capsys.readouterr().err
    assert str(caught.value) == (
        "no alpha was published for the recipe olmoe-1b-7b: give `alpha`, or find the best one for your prompts with "
        "python -m expo.search --recipe olmoe-1b-7b"
    )
    one = recipe("olmoe-1b-7b")
    for role, name in (("sft", one.sft), ("aligned", one.aligned)):
        server.repos[name] = Repo()
        files = (ROOT / "expo" / "demo" / role).iterdir()
        server.repos[name].commit({path.name: path.read_bytes() for path in files})
    words = ("--recipe", "olmoe-1b-7b", "--alpha", "0.5", "--plan", "--json", "--quiet")
    with client.run("-m", "expo.fast", *words) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["problems"] == []
    assert complete_request(None, None, 1.0, "olmoe-1b-7b")[:3] == (one.sft, one.aligned, (1.0,)), "as expo.search asks"


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
    for one in OF_PAPER:
        assert isinstance(one, Recipe)
        assert one.alpacaeval is not None
        assert one.mtbench is not None
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
    header, *rows = table().partition("\n\n")[0].splitlines()
    assert len(rows) == len(recipes())
    for one, row in zip(recipes()[len(NAMES) :], rows[len(NAMES) :], strict=True):
        assert row.split()[:2] == [one.recipe, "-" if one.alpha is None else f"{one.alpha:g}"]
        assert row[header.rindex("sft") :] == one.sft
        assert row[header.index("MT-Bench") :].startswith("- ")
        assert row[header.index("aligned") :].split()[0] == one.aligned + "*" * bool(one.note)
        dash = row[header.index("LC win rate %") :].startswith("- ")
        assert dash is (one.alpacaeval is None)
    rows = rows[: len(NAMES)]
    for one, row in zip(OF_PAPER, rows, strict=True):
        assert row.split()[0] == one.recipe
        assert one.alpacaeval is not None
        assert one.mtbench is not None
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
    legend = table().partition("\n\n")[2]
    assert (
        "zephyr-7b-alpha to tulu-2-dpo-70b: Model Extrapolation Expedites Alignment, ACL 2025 (arXiv 2404.16" in legend
    )
    assert "zephyr-7b-dpo-full to llama-3-8b-simpo: model cards of the paper's authors" in legend
    assert "python -m expo.search" in legend
    assert legend.count("* the repository's name follows that of zephyr_0.1") == 1


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
    assert str(caught.value).endswith("? python -m expo.fast --list-recipes shows all 27")


@pytest.mark.parametrize("name", ["", "gpt2", "/", "\n"])
def test_a_name_that_is_near_to_none(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(name)
    assert str(caught.value) == f"no recipe {name!r}: python -m expo.fast --list-recipes shows all 27"


def test_no_library_is_imported_for_the_list() -> None:
    code = "import sys, expo.inputs.recipes as r; r.table(); print({'difflib', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
