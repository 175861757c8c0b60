"""Where torch sees no GPU, what needs one is collected, and skipped with a reason that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
ROOT = Path(__file__).parents[2]
HIDDEN = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")  # the GPUs that there may be
CONTESTANTS, DTYPES = 9, 3


def run(report: Path, *arguments: str) -> list[ElementTree.Element]:
    """The cases of a run of pytest with all GPUs hidden; it must succeed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | HIDDEN
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(ElementTree.parse(report).iter("testcase"))


def reasons(cases: list[ElementTree.Element]) -> list[str]:
    """Why each was skipped; "" where it was not."""
    found = (case.find("skipped") for case in cases)
    return ["" if skipped is None else skipped.get("message", "") for skipped in found]


def test_all_are_skipped_for_want_of_a_gpu(tmp_path: Path) -> None:
    cases = run(tmp_path / "report.xml", "tests/execution/test_gpu.py")
    assert len(cases) >= CONTESTANTS * DTYPES
    assert [reason for reason in reasons(cases) if "CUDA device" not in reason] == []


def test_the_marker_selects_the_gpu_benchmarks_alone(tmp_path: Path) -> None:
    cases = run(tmp_path / "report.xml", "bench", "-m", "gpu", "--benchmark-only")
    assert len(cases) == CONTESTANTS * DTYPES
    assert {case.get("classname") for case in cases} == {"bench.bench_gpu"}
    assert [reason for reason in reasons(cases) if "CUDA device" not in reason] == []
