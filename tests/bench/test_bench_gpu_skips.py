"""Tests and benchmarks that need a GPU are collected without one, and skipped with a reason that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
ROOT = Path(__file__).parents[2]
HIDDEN = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")  # the machine may have GPUs
CONTESTANTS, DTYPES = 9, 3


def run(report: Path, *arguments: str) -> list[ElementTree.Element]:
    """Run pytest with all GPUs hidden, which must succeed, and return its test cases."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | HIDDEN
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(ElementTree.parse(report).iter("testcase"))


def reasons(cases: list[ElementTree.Element]) -> list[str]:
    """Return the reason why each case was skipped; "" if it was not skipped."""
    skips = (case.find("skipped") for case in cases)
    return ["" if skip is None else skip.get("message", "") for skip in skips]


@pytest.mark.exhaustive  # pytest collects everything in a process of its own
def test_all_tests_are_skipped_without_a_gpu(tmp_path: Path) -> None:
    cases = run(tmp_path / "report.xml", "tests/execution/test_gpu.py")
    assert len(cases) >= CONTESTANTS * DTYPES
    assert [reason for reason in reasons(cases) if "CUDA device" not in reason] == []


def test_the_marker_selects_the_gpu_benchmarks_alone(tmp_path: Path) -> None:
    cases = run(tmp_path / "report.xml", "bench", "-m", "gpu", "--benchmark-only")
    assert len(cases) == CONTESTANTS * DTYPES
    assert {case.get("classname") for case in cases} == {"bench.bench_gpu"}
    assert [reason for reason in reasons(cases) if "CUDA device" not in reason] == []
