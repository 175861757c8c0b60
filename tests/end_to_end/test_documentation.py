"""README.md and the pages of docs/: their commands and code run unchanged, and their links and names are correct."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from expo.cli import with_options

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").is_file())
README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = 150  # of README.md
PROGRAMS = {"python": ["-W", "error"], "torchrun": ["-m", "torch.distributed.run"]}
# The command compiles every kernel. `test_command` of tests/codegen compiles three by the same command in `make test`.
LONG = {"docs/gpu.md-0": pytest.mark.exhaustive}
OPTIONS = {"command-line.md": "expo.fast", "search.md": "expo.search", "diff.md": "expo.diff"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page: console lines or Python code."""

    page: Path
    kind: str
    text: str

    def commands(self) -> list[list[str]]:
        """Return the commands to run; `make` and `pip` lines are left to other tests."""
        lines = self.text.replace("\\\n", " ").splitlines()
        ours = [shlex.split(line[2:]) for line in lines if re.match(r"\$ (python|torchrun .*) -m expo", line)]
        return [[sys.executable, *PROGRAMS[program], *words] for program, *words in ours]


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(console|python)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    return [Block(page, kind, text) for kind, text in found]


BLOCKS = {f"{name_of(page)}-{number}": block for page in PAGES for number, block in enumerate(blocks_of(page))}


class Clone:
    """A fresh folder for one page, which looks to the commands like the root folder of a clone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ran: set[str] = set()
        (folder / "expo").symlink_to(ROOT / "expo")

    def run(self, name: str) -> None:
        """Run a block, after the earlier ones of its page that have not been run here: it may need their files."""
        for other, block in BLOCKS.items():
            if block.page == BLOCKS[name].page and other not in self._ran:
                self._ran.add(other)
                self._run(block)
            if other == name:
                return

    def _run(self, block: Block) -> None:
        if block.kind == "python":
            # A new process would take seconds to import torch. Warnings are errors here too.
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self._folder)
                exec(block.text, {"__name__": "__main__"})
            return
        for command in block.commands():
            done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Clone]:
    return {page: Clone(tmp_path_factory.mktemp("clone")) for page in PAGES}


def test_the_readme_and_the_pages_have_something_to_run() -> None:
    for pages in ([README], PAGES[1:]):
        blocks = [block for block in BLOCKS.values() if block.page in pages]
        assert any(block.kind == "console" and block.commands() for block in blocks)
        assert any(block.kind == "python" for block in blocks)
    assert sum(len(block.commands()) for block in BLOCKS.values() if block.kind == "console") >= 10
    assert sum(block.kind == "python" for block in BLOCKS.values()) >= 10


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in BLOCKS])
def test_block(name: str, clones: dict[Path, Clone]) -> None:
    clones[BLOCKS[name].page].run(name)


# Links.


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)\)", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_or_a_heading(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and (target.suffix != ".md" or anchor not in anchors_of(target))):
            broken.append(link)
    assert broken == []


def test_every_link_is_an_inline_link() -> None:
    """The tests above find inline links only."""
    for page in PAGES:
        assert not re.search(r"^\[[^\]]+\]:|<(a|img) ", prose_of(page), re.MULTILINE), page


@pytest.mark.parametrize("start", [README, INDEX], ids=name_of)
def test_every_page_is_linked_from_the_readme_and_from_the_index(start: Path) -> None:
    linked = {(start.parent / link.partition("#")[0]).resolve() for link in links_of(start)}
    assert [name_of(page) for page in PAGES[1:] if page not in linked | {start}] == []


# Form.


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_begins_with_its_title_and_a_sentence(page: Path) -> None:
    assert re.match(r"# .+\n\n[A-Za-z`].+\n", text_of(page))


# Names of options and tests.


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_command_is_explained(name: str) -> None:
    command = [sys.executable, "-m", OPTIONS[name], "--help"]
    shown = subprocess.check_output(command, cwd=ROOT, text=True)
    options = set(re.findall(r"--[a-z][a-z-]+", shown.partition("\noptions:")[2]))
    assert len(options) > 5
    rows = "\n".join(line.split(" | ")[0] for line in text_of(INDEX.with_name(name)).splitlines() if line[:3] == "| `")
    assert options - set(re.findall(r"--[a-z][a-z-]+", rows)) == set()


def test_every_row_of_what_can_go_wrong_names_a_test_that_exists() -> None:
    section = text_of(INDEX.with_name("reliability.md")).partition("## Failures")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert all(re.search(r"`test_\w+`", row[3]) for row in rows)
    check_names("\n".join(row[3] for row in rows))


def test_every_refusal_of_the_docs_names_a_test_that_exists() -> None:
    rows = refusals()
    assert len(rows) > 15
    assert all(re.search(r"`test_\w+`", row[-1]) for row in rows)
    check_names("\n".join(row[-1] for row in rows))


def refusals() -> list[list[str]]:
    """Return the cells of each row of refusals.md; the first one is a message."""
    lines = text_of(INDEX.with_name("refusals.md")).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if re.match(r"\| (?!(message|note) \|)", line)]


def messages() -> str:
    """Return every string of the package's code, a line each, as the command line prints it."""
    found = []
    for path in (ROOT / "expo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "..." for part in parts]
            found.append("".join(text for text in texts if isinstance(text, str)))
    return with_options("\n".join(found))


def test_every_message_of_the_refusals_is_in_the_code() -> None:
    code = messages()
    assert [row[0] for row in refusals() if row[0] not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    check_names(text_of(page))


def check_names(text: str) -> None:
    """Assert that every `test_name` and every `test_file.py` of the text exists in the tests."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    defined = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in defined] == []
    assert set(re.findall(r"`(test_\w+\.py)`", text)) <= {path.name for path in files}
