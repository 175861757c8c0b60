"""The benchmarks run at a size that takes seconds; their pairs, page cache and checks are right."""

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

from bench import page_cache, result_checks
from bench.machine import describe
from bench.pairs import nbytes, scaled_llama, write_pair
from bench.report import extract_figures, make_tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), scaled_llama(1e6), 2)


def test_a_pair_is_random_finite_and_close(pair: Path) -> None:
    """safetensors reads both checkpoints, and they differ by more than roundings."""
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
    assert page_cache.resident_share(files) == 1
    page_cache.evict(files)
    left = page_cache.resident_share(files)
    if left == 1:
        pytest.skip("this filesystem is in memory")
    assert left < 0.01


def test_a_wrong_result_is_noticed(pair: Path) -> None:
    """The checks refuse a copy of aligned in the place of the merge, and damaged copies."""
    out = pair / "out"
    out.mkdir()
    for path in (pair / "aligned").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    result_checks.check_copy(out)
    result_checks.check_exact(out, alpha=0.0)
    for check in (result_checks.check_exact, result_checks.check_close):
        with pytest.raises(AssertionError):
            check(out)
    first = min(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-2] + b"ab")
    with pytest.raises(AssertionError):
        result_checks.check_copy(out)
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(SafetensorError):
        result_checks.check_exact(out)


def test_the_machine_is_described_without_a_name() -> None:
    machine = describe("CPU of a test")
    assert machine["cpu"] == "CPU of a test"
    assert {"cores", "memory_gib", "disk", "filesystem", "kernel", "python", "numpy", "torch", "expo"} <= machine.keys()
    assert os.uname().nodename not in machine.values()
    assert tempfile.gettempdir() not in json.dumps(machine)


def test_a_small_run_gives_a_report(tmp_path: Path) -> None:
    """Merges from a cold cache and peaks of memory run, with checkpoints of up to 25 MB."""
    raw = tmp_path / "raw.json"
    chosen = ["bench/bench_cold_merge.py", "bench/bench_memory.py", "-k", "test_cold or test_peak_memory"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", *chosen]
    done = subprocess.run(
        [*command, f"--benchmark-json={raw}"],
        cwd=ROOT,
        env={**os.environ, "EXPO_BENCH_GB": "0.005"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = extract_figures(json.loads(raw.read_text()))
    text = "\n".join(make_tables(figures))
    assert text.count("| ours, sparse inputs |") == 5
    if "test_cold[0.005GB]" in figures["benchmarks"]:  # it is skipped where files stay in the page cache
        assert "reading alone" in text
