"""These tests notice if the compiled kernel becomes slower: they count its instructions, and compare it with memcpy.

The counts come from single steps (`helpers/instructions.py`), so they do not depend on how busy the machine is.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expo.kernels.contract import CODES

cpu = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built", exc_type=ImportError)

SCRIPT = Path(__file__).parents[1] / "helpers" / "instructions.py"
# At most this many instructions for each element, without and with statistics. GCC 12's builds have 1.06 and 1.84 for
# bf16 with AVX-512, and 2.25 and 3.61 with AVX2.
MOST = {
    ("avx512", "BF16"): (1.15, 1.9),
    ("avx512", "F16"): (0.75, 1.75),
    ("avx512", "F32"): (0.7, 1.7),
    ("avx2", "BF16"): (2.4, 3.8),
    ("avx2", "F16"): (1.5, 3.2),
    ("avx2", "F32"): (1.2, 2.7),
}
OF_MEMCPY = 0.25  # the least rate of the kernel divided by memcpy's, in bytes read and written a second; 1.03 measured


def count(variant: str, dtype: str, outputs: int, measure: bool) -> float:
    """Return the instructions for each element and output of a variant that this processor has."""
    if variant not in cpu.variants():
        pytest.skip(f"this processor has no {variant}")
    words = [variant, str(CODES[dtype]), str(CODES[dtype]), str(outputs), str(int(measure))]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)
    if "PermissionError" in done.stderr:
        pytest.skip("this system allows no tracing")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("measure", [False, True], ids=["without statistics", "with them"])
@pytest.mark.parametrize(
    ("variant", "dtype"), [pytest.param(*key, marks=() if key[1] == "BF16" else pytest.mark.exhaustive) for key in MOST]
)
def test_instructions_for_an_element(variant: str, dtype: str, measure: bool) -> None:
    assert 0.5 < count(variant, dtype, 1, measure) <= MOST[variant, dtype][measure]


def test_code_without_these_vectors_exceeds_the_bounds() -> None:
    assert count("portable", "BF16", 1, False) > MOST["avx2", "BF16"][0]


@pytest.mark.parametrize("variant", ["avx512", "avx2"])
def test_later_alphas_share_the_distance(variant: str) -> None:
    """With two alphas an output takes fewer instructions than with one, because the distance is computed once."""
    assert count(variant, "BF16", 2, True) < 0.95 * count(variant, "BF16", 1, True)


@pytest.mark.alone
def test_the_kernel_beside_memcpy() -> None:
    """One thread of the kernel moves at least a quarter as many bytes in a second as memcpy.

    The two run in turn, and the shortest time of each counts. The kernel reads two bytes for each byte that it writes,
    and memcpy reads one.
    """
    from expo.kernels import _cpu

    n = 8 << 20
    sft, aligned, out = (bytearray(os.urandom(1 << 20) * (2 * n >> 20)) for _ in range(3))
    to, source = ((ctypes.c_char * (2 * n)).from_buffer(memory) for memory in (out, aligned))
    ours, copy = [], []
    for _ in range(30):
        began = time.perf_counter()
        ctypes.memmove(to, source, 2 * n)
        middle = time.perf_counter()
        _cpu.extrapolate(sft, 0, aligned, 0, n, (out,), (0.3,), False)
        copy.append(middle - began)
        ours.append(time.perf_counter() - middle)
    assert (3 * 2 * n / min(ours)) / (2 * 2 * n / min(copy)) >= OF_MEMCPY
