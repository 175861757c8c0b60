"""The compiled engine executes few instructions for each element: the counts do not depend on the machine's load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from expo.kernels.contract import CODES

cpu = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built", exc_type=ImportError)
SCRIPT = Path(__file__).parents[1] / "helpers" / "instructions.py"

# At most this many instructions for each element, with statistics and without, where sft and aligned are bf16.
MOST = {"avx512": (1.9, 1.15), "avx2": (3.8, 2.4)}


def count(variant: str, dtype: str, outputs: int, measure: bool) -> float:
    words = [variant, str(CODES[dtype]), str(CODES[dtype]), str(outputs), str(int(measure))]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)
    if "PermissionError" in done.stderr:
        pytest.skip("this system allows no tracing")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def skip_without(variant: str) -> None:
    if variant not in cpu.variants():
        pytest.skip(f"this processor has no {variant}")


@pytest.mark.parametrize("measure", [True, False], ids=["with statistics", "without"])
@pytest.mark.parametrize("variant", MOST)
def test_instructions_for_each_element(variant: str, measure: bool) -> None:
    skip_without(variant)
    assert 0.5 < count(variant, "BF16", 1, measure) <= MOST[variant][not measure]


@pytest.mark.parametrize("variant", MOST)
def test_later_alphas_share_the_distance(variant: str) -> None:
    """With two alphas an output takes fewer instructions than with one, because the distance is computed once."""
    skip_without(variant)
    assert count(variant, "BF16", 2, True) < 0.95 * count(variant, "BF16", 1, True)
