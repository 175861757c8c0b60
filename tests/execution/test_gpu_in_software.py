"""The tests that need a GPU run on the GPU in software, in a process of their own that finds it from the start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

ROOT = Path(__file__).parents[2]
ONE_PAIR = "(special_values or in_place) and BF16-F16 or statistics and F32-BF16-3"
OTHERS = "public_function or model_in_place or capture or not_the_current or keeps_its_place or pass_their"
# The GPU in software has too little memory for 2^31 elements, and takes an hour for all lengths and random bits.
ALL = (
    "not two_to_the_31 and not lengths and not random_bits or lengths and F32-BF16-0 or random_bits and plain-BF16-F16"
)


def run(selection: str, timeout: float) -> int:
    """Run a selection of test_gpu.py with two devices, and return how many tests have passed."""
    command = ["-m", "pytest", "-q", "-p", "on_software_gpu", "-p", "no:cacheprovider", "-k", selection]
    environment = {"PYTHONPATH": str(ROOT / "tests" / "helpers"), "SOFTWARE_GPUS": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "tests/execution/test_gpu.py"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found
    assert "skipped" not in done.stdout
    return int(found[1])


@pytest.mark.parametrize(("selection", "least"), [(ONE_PAIR, 12), (OTHERS, 25)], ids=["one pair", "others"])
def test_a_part(selection: str, least: int) -> None:
    assert run(selection, 300) >= least


@pytest.mark.exhaustive
def test_nearly_all() -> None:
    assert run(ALL, 1500) >= 180
