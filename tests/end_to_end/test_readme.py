"""The README's commands and code, run as they stand, in one folder and in order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone's root to the commands."""
    path = tmp_path_factory.mktemp("clone")
    (path / "expo").symlink_to(ROOT / "expo")
    return path


def commands(block: str) -> list[list[str]]:
    """The lines behind a `$` that call our modules; make and pip are other tests' business."""
    lines = block.replace("\\\n", " ").splitlines()
    ours = [shlex.split(line[2:]) for line in lines if re.match(r"\$ (python|torchrun .*) -m expo", line)]
    programs = {"python": ["-W", "error"], "torchrun": ["-m", "torch.distributed.run"]}
    return [[sys.executable, *programs[program], *words] for program, *words in ours]


def test_the_readme_has_something_to_run() -> None:
    assert sum(len(commands(text)) for kind, text in BLOCKS if kind == "console") >= 4
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 3


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=range(len(BLOCKS)))
def test_block(kind: str, text: str, folder: Path) -> None:
    runs = [[sys.executable, "-W", "error", "-c", text]]
    if kind == "console":
        runs = commands(text)
    for command in runs:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_row_of_what_can_go_wrong_names_a_test_that_exists() -> None:
    section = README.partition("## When something goes wrong")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    names = [name for row in rows for name in re.findall(r"`(test_\w+)`", row[3])]
    assert len(rows) > 10
    assert all(re.search(r"`test_\w+`", row[3]) for row in rows)
    assert [name for name in names if f"def {name}(" not in defined_tests()] == []


def defined_tests() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))


def test_every_refusal_of_the_docs_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (?!-|the (message|note) says)", line)]
    assert len(rows) > 15
    assert all(re.search(r"`test_\w+`", row) for row in rows)
    names = re.findall(r"`(test_\w+)`", text)
    assert [name for name in names if f"def {name}(" not in defined_tests()] == []
