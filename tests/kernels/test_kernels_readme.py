"""These tests check the page on kernels: its code runs unchanged, its links lead to files, its tables are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expo.options import ENGINES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "kernels" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
KERNELS = [block for block in BLOCKS if "@triton.jit" in block]


def run_block(block: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the code from a file, because Triton reads the source of a kernel."""
    file = folder / "block.py"
    file.write_text(block, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "error", str(file)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)


def test_the_page_has_code() -> None:
    assert (len(BLOCKS), len(KERNELS)) == (3, 1)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in KERNELS], ids=("call", "engine"))
def test_code_runs(block: str, tmp_path: Path) -> None:
    done = run_block(block, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_kernel_runs_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.8", reason="no Triton, or one whose interpreter cannot run the kernel")
    (block,) = KERNELS
    done = run_block(block, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    wrong = run_block(block.replace("o - y, e", "o - x, e"), tmp_path, TRITON_INTERPRET="1")
    assert "AssertionError" in wrong.stderr, "the comparison on the page does not notice a wrong kernel"


def test_links_lead_to_files() -> None:
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    assert len(links) > 15
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_module_is_on_the_page() -> None:
    modules = {path.name for path in PAGE.parent.glob("*.py")}
    assert {name for name in modules if f"[`{name}`]({name})" not in TEXT} == set()


def test_every_engine_is_in_the_table() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| [")]
    assert {name for name in ENGINES if not any(f"| `{name}`," in row for row in rows)} == {"auto"}
