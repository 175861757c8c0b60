"""Limits of a merge's cost: bytes read and written, memory for any size of the model, and imported modules.

Each test counts in a process of its own, so the numbers do not depend on other work of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.pairs import scaled_llama, write_pair
from expo.demo import ALIGNED, SFT

ROOT = Path(__file__).parents[2]
SMALL = 4 << 20  # bytes of code, headers, journal and card besides the weights; 0.8 MB were measured
CALL = 1 << 20  # the least bytes of output for each write call; 3.5 MB were measured, and a tensor here has 0.5
ALONE = 48  # write calls besides the weights'
# Bytes between a pair of 200 MB and one of 800 MB; 0.1 MB were measured. The smaller merge takes milliseconds, so its
# workers' buffers, 32 MiB at most, may be freed before the memory is read.
MORE_ANONYMOUS = 40_000_000
MORE_RESIDENT = 100_000_000  # bytes; 11 MB were measured
MERGE = """
import json, sys
import expo

def fields(name):
    return dict(line.split(":", 1) for line in open(f"/proc/self/{name}").read().splitlines())

def kilobytes(name):
    return int(fields("status")[name].split()[0])

anonymous = []
sft, aligned, out, *alphas = sys.argv[1:]
before = fields("io")
merged = expo.merge(sft, aligned, list(map(float, alphas)), out, engine="cpu",
                    progress=lambda done, total: anonymous.append(kilobytes("RssAnon")))
io = {name: int(value) - int(before[name]) for name, value in fields("io").items()}
memory = {"anonymous": max(anonymous) * 1024, "resident": kilobytes("VmHWM") * 1024}
print(json.dumps({**io, **memory, "inputs": merged.bytes_read, "outputs": merged.bytes_written}))
"""


def merge(pair: Path, out: Path, *alphas: float) -> dict[str, int]:
    """Return the counts of bytes and calls of a process that merges once."""
    command = [sys.executable, "-c", MERGE, pair / "sft", pair / "aligned", out, *alphas]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: int(value) for name, value in json.loads(done.stdout).items()}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    if not Path("/proc/self/io").exists():
        pytest.skip("this system keeps no account of a process's reads and writes")


@pytest.fixture(scope="module")
def unmapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a pair of 150 MB each that is open for writing, so that the merge reads it with pread, which is counted."""
    pair = write_pair(tmp_path_factory.mktemp("pair"), scaled_llama(75e6), 3)
    with ExitStack() as stack:
        for path in pair.glob("*/*.safetensors"):
            stack.enter_context(open(path, "r+b"))
        yield pair


@pytest.mark.parametrize("alphas", [(0.3,), (0.1, 0.3, 0.5)], ids=["one", "three"])
def test_inputs_are_read_once_and_outputs_written_once(
    unmapped: Path, tmp_path: Path, alphas: tuple[float, ...]
) -> None:
    found = merge(unmapped, tmp_path / "out-{alpha}", *alphas)
    weights = sum(path.stat().st_size for path in unmapped.glob("*/*.safetensors"))
    assert weights - SMALL < found["inputs"] <= weights
    assert found["inputs"] <= found["rchar"] <= found["inputs"] + SMALL
    assert found["outputs"] <= found["wchar"] <= found["outputs"] + SMALL
    assert len(alphas) * weights / 2 - SMALL < found["outputs"]


def test_writes_are_large(unmapped: Path, tmp_path: Path) -> None:
    found = merge(unmapped, tmp_path / "out", 0.3)
    assert found["syscw"] <= ALONE + found["outputs"] / CALL


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path / str(size), scaled_llama(size * 1e6 / 2), 3, sparse=True) for size in (200, 800)]
    small, large = (merge(pair, pair / "out", 0.3) for pair in pairs)
    assert large["inputs"] > 3.5 * small["inputs"]
    assert large["anonymous"] - small["anonymous"] < MORE_ANONYMOUS, (small, large)
    assert large["resident"] - small["resident"] < MORE_RESIDENT, (small, large)


@pytest.mark.parametrize(("options", "most"), [("--help", 150), ("--plan", 215), ("--quiet", 240)])
def test_modules_imported(tmp_path: Path, options: str, most: int) -> None:
    """The measured numbers were 115, 177 and 201; `import torch` alone loads 1122 modules."""
    inputs = ["--sft", str(SFT), "--aligned", str(ALIGNED), "--alpha", "0.5", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-X", "importtime", "-m", "expo.fast", *inputs, options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert 100 < len(names) <= most, names
    assert not {"torch", "transformers", "safetensors", "asyncio"} & set(names)
    assert ("expo.merging.merge" in names) is (options != "--help")
