"""The benchmarks run, at a size that takes seconds, and what they rest on: pairs, the page cache, rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from bench import pages, rounds
from bench.machine import describe
from bench.pairs import nbytes, scaled_llama, write_pair
from bench.report import keep, tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), scaled_llama(1e6), 2)


def test_a_pair_is_random_finite_and_close(pair: Path) -> None:
    """safetensors reads it, and sft is not aligned."""
    for path in sorted((pair / "aligned").iterdir()):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as aligned, safe_open(pair / "sft" / path.name, "pt") as sft:
            for name in aligned.keys():  # noqa: SIM118, safe_open is no dict
                a, s = (file.get_tensor(name).float() for file in (aligned, sft))
                assert bool((a.abs() < 1).all())
                assert 0.1 < float(((a - s).abs() / a.abs()).max()) < 0.25
                assert float(a.std()) > 0.005


def test_a_pair_has_the_size_that_was_asked_for() -> None:
    for gigabytes in (0.5, 2, 8, 40):
        assert 0.96 < nbytes(scaled_llama(gigabytes * 1e9 / 2)) / (gigabytes * 1e9) <= 1


def test_what_is_evicted_is_not_resident(pair: Path) -> None:
    files = sorted(pair.glob("*/*.safetensors"))
    for path in files:
        path.read_bytes()
    assert pages.resident(files) == 1
    pages.evict(files)
    left = pages.resident(files)
    if left == 1:
        pytest.skip("this filesystem is in memory")
    assert left < 0.01


def test_a_wrong_result_is_seen(pair: Path) -> None:
    """The checks of the rounds, on a copy of aligned as if it were the merge."""
    out = pair / "out"
    out.mkdir()
    for path in (pair / "aligned").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    rounds.copied(out)
    rounds.exact(out, alpha=0.0)
    for check in (rounds.exact, rounds.close):
        with pytest.raises(AssertionError):
            check(out)
    first = min(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-2] + b"ab")
    with pytest.raises(AssertionError):
        rounds.copied(out)
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(SafetensorError):
        rounds.exact(out)


def test_the_machine_is_described_without_a_name() -> None:
    said = describe("CPU of a test")
    assert said["cpu"] == "CPU of a test"
    assert {"cores", "memory_gib", "disk", "filesystem", "kernel", "python", "numpy", "torch", "expo"} <= said.keys()
    assert os.uname().nodename not in said.values()
    assert tempfile.gettempdir() not in json.dumps(said)


def test_a_small_run_gives_a_report(tmp_path: Path) -> None:
    """Merges from a cold cache and the peaks of memory, of 5 and up to 25 MB."""
    raw = tmp_path / "raw.json"
    what = ["bench/bench_merge.py", "bench/bench_memory.py", "-k", "test_cold or test_peak_memory"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", *what]
    done = subprocess.run(
        [*command, f"--benchmark-json={raw}"],
        cwd=ROOT,
        env={**os.environ, "EXPO_BENCH_GB": "0.005"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept: dict[str, Any] = keep(json.loads(raw.read_text()))
    text = "\n".join(tables(kept))
    assert text.count("| ours, sparse inputs |") == 5
    if "test_cold[0.005GB]" in kept["benchmarks"]:  # it is skipped where the page cache keeps what it has
        assert "reading alone" in text
