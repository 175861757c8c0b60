"""These tests run `tests/kernels/interpreted` in a process in which Triton's interpreter runs the kernel on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", minversion="3.8", reason="no Triton, or one whose interpreter cannot run the kernel")
ROOT = Path(__file__).parents[2]


def run_interpreted(report: Path, interpret: str) -> subprocess.CompletedProcess[str]:
    arguments = ["tests/kernels/interpreted", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def counted(report: Path, what: str) -> int:
    return sum(int(suite.get(what, 0)) for suite in ElementTree.parse(report).iter("testsuite"))


@pytest.mark.exhaustive  # half a minute
def test_kernel_under_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = run_interpreted(report, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted(report, "tests") - counted(report, "skipped") > 100


def test_nothing_is_collected_without_the_interpreter(tmp_path: Path) -> None:
    """Without the interpreter pytest collects nothing in the folder, and reports no error."""
    done = run_interpreted(tmp_path / "report.xml", "0")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert "error" not in done.stdout.lower()
