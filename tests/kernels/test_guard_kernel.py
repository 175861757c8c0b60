"""These tests notice if the compiled kernel becomes slower: they count its instructions, and compare it with memcpy.

Valgrind counts the instructions for an element; the counts do not depend on how busy the machine is. The bounds are the
counts of GCC 12's build on the processor with AVX2 that valgrind simulates, and a quarter more.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from expo.dtypes import ITEMSIZE

_cpu = pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)

N = 1 << 16  # elements of a counted call
MEASURED = {  # the instructions for an element of a merge without and with statistics
    "BF16": (2.74, 28.2),
    "F16": (1.30, 23.9),
    "F32": (1.05, 21.2),
}
MARGIN = 1.25
OF_MEMCPY = 0.25  # the least rate of the kernel divided by memcpy's, in bytes read and written a second; 0.98 measured
CALLS = f"""
import sys
sys.path.insert(0, sys.argv[1])
import _cpu
for code, item in enumerate({[ITEMSIZE[dtype] for dtype in MEASURED]}):
    for measure in False, True:
        sft, aligned, out = (bytearray({N} * item) for _ in range(3))
        _cpu.extrapolate(sft, code, aligned, code, {N}, (out,), (0.3,), measure)
"""


def instructions(engine: Path, tmp_path: Path) -> dict[str, tuple[float, float]]:
    """Return the counts of the _cpu module in a folder, in the form of MEASURED; callgrind dumps one count per call."""
    out = tmp_path / "callgrind"
    tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
    only = ["--toggle-collect=extrapolate", "--dump-after=extrapolate"]
    command = [*tool, *only, sys.executable, "-S", "-E", "-c", CALLS, str(engine)]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    dumps = [out.with_name(f"callgrind.{k + 1}").read_text() for k in range(2 * len(MEASURED))]
    found = [int(re.findall(r"^summary: (\d+)", dump, re.MULTILINE)[0]) / N for dump in dumps]
    return dict(zip(MEASURED, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.fixture
def gcc_build() -> Path:
    """Return the folder of the compiled engine; skip the test unless GCC 12 or later built it for x86-64 with AVX2."""
    compiler = re.search(rb"GCC: \([^)]*\) (\d+)", Path(_cpu.__file__).read_bytes())
    if compiler is None or int(compiler[1]) < 12:
        pytest.skip("measured for builds of GCC 12 and later")
    if os.uname().machine != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("measured for x86-64 with AVX2")
    return Path(_cpu.__file__).parent


@pytest.fixture
def countable(gcc_build: Path) -> Path:
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    return gcc_build


def too_many(found: dict[str, tuple[float, float]]) -> list[tuple[str, int]]:
    """Return the counts over their bounds as (dtype, k), where k is 0 without statistics and 1 with them."""
    return [(dtype, k) for dtype in MEASURED for k in (0, 1) if found[dtype][k] > MARGIN * MEASURED[dtype][k]]


def test_instructions_for_an_element(countable: Path, tmp_path: Path) -> None:
    found = instructions(countable, tmp_path)
    assert min(min(pair) for pair in found.values()) > 0.1, "nothing was counted"
    assert too_many(found) == [], found


def test_the_bound_is_exceeded_by_a_build_without_vectors(countable: Path, tmp_path: Path) -> None:
    """A build without vectors exceeds all bounds but one: fp16 without statistics is written with intrinsics."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    source = Path(__file__).parents[2] / "kernels" / "_cpu.c"
    built = tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O2", "-fno-tree-vectorize", "-ffp-contract=off", "-std=gnu11", "-shared", "-fPIC", "-w"]
    headers = f"-I{sysconfig.get_paths()['include']}"
    subprocess.run([compiler, *flags, headers, str(source), "-o", str(built), "-lm"], check=True)
    found = instructions(tmp_path, tmp_path)
    assert too_many(found) == [("BF16", 0), ("BF16", 1), ("F16", 1), ("F32", 0), ("F32", 1)], found


@pytest.mark.alone
@pytest.mark.usefixtures("gcc_build")
def test_the_kernel_beside_memcpy() -> None:
    """One thread of the kernel moves at least a quarter as many bytes in a second as memcpy.

    The two run in turn, and the shortest time of each counts. The kernel reads two bytes for each byte that it writes,
    and memcpy reads one.
    """
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
