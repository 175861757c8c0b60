"""The tables of bench/report.py and the pictures of bench/plots.py, from invented figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.plots import draw_pictures
from bench.report import extract_figures, make_report, make_tables

MACHINE = dict.fromkeys(("cpu", "cores", "memory_gib", "disk", "filesystem", "kernel", "python", "torch", "expo"), "x")
VERSIONS = {"device": "GPU of a test", "driver": "1.2", "torch": "3.4", "triton": "5.6"}
ON_GPU: dict[str, Any] = {
    "test_gpu[plain-BF16]": {"gb_per_s": 1234.5, "of_roof": 0.98, **VERSIONS},
    "test_gpu[plain-F16]": {"gb_per_s": 1200.0, "of_roof": 0.97, **VERSIONS},
}
ROW = "| plain | 1234.5 (0.98) | 1200.0 (0.97) | not run |"


def seconds(median: float) -> dict[str, float]:
    return {"median": median, "min": median - 0.5, "max": median + 0.5}


def rival(median: float, ratio: float) -> dict[str, float]:
    return {**seconds(median), **{f"ratio_{name}": value for name, value in seconds(ratio).items()}}


def merge(size: float, ours: float, **rivals: dict[str, float]) -> dict[str, Any]:
    """Return the row of a merge whose inputs of `size` GB were all in the page cache."""
    row = {"checkpoint_bytes": int(size * 1e9), "rounds": 5, "inputs_resident_min": 1.0, "rivals": rivals}
    return {**seconds(ours), **row}


def memory(size: float, resident: float) -> dict[str, float]:
    return {"checkpoint_bytes": int(size * 1e9), "resident_mb": resident, "anonymous_mb": 12.0}


KERNEL = {"gb_per_s": 13.9, "memcpy_gb_per_s": 14.2, "of_memcpy": 0.98}
FIGURES: dict[str, Any] = {
    "machine": MACHINE,
    "date": "2026-01-02",
    "commit": "abc",
    "benchmarks": {
        "test_warm[2GB]": merge(2, 1.25, cp_synced=rival(1.75, 0.75), cp_unsynced=rival(0.75, 1.75)),
        "test_warm[8GB]": merge(8, 5.25, cp_synced=rival(7.75, 0.68)) | {"inputs_resident_min": 0.871},
        "test_warm_slow[loop-2GB]": merge(2, 1.5, loop_synced=rival(9.5, 0.55), loop_unsynced=rival(9.25, 0.56)),
        "test_cold[2GB]": merge(2, 3.25, read_both=rival(4.5, 0.72), cp_synced=rival(8.5, 0.6)),
        "test_sweep[3_alphas-2GB]": merge(2, 6.25, separate_merges=rival(11.5, 0.54)) | {"alphas": 3},
        "test_sweep[2_alphas-2GB]": merge(2, 4.25, separate_merges=rival(7.5, 0.57)) | {"alphas": 2},
        "test_peak_memory[1GB]": memory(1, 53),
        "test_peak_memory[40GB]": memory(40, 60),
        "test_memory_of_programs[loop-2GB]": memory(2, 3600),
        "test_help": seconds(0.75),
        "test_plan_70b": seconds(1.0),
        "test_import_torch": seconds(2.0),
        "test_kernel[cpu-BF16]": KERNEL,
        "test_kernel[cpu-F16]": KERNEL,
        "test_kernel[cpu-F32]": KERNEL,
    },
}
WITHOUT_GPU = list(make_tables(FIGURES))


def table(title: str) -> str:
    """Return the part of the report that begins with this title."""
    text = "\n".join(WITHOUT_GPU)
    assert text.count(f"| {title} |") == 1
    return text.partition(f"| {title} |")[2].partition("\n\n")[0]


def test_synced_and_unsynced_rivals_are_in_tables_of_their_own() -> None:
    synced, unsynced = (
        table(f"inputs cached, {which}") for which in ("both synced to the disk", "ours synced and the rival not")
    )
    copy = "`cat` of sft and `cp` of aligned | 2"
    assert f"| {copy} | 1.75 (1.25 to 2.25) | 1.25 (0.75 to 1.75) | 0.75 (0.25 to 1.25) | 5 |" in synced
    assert f"| {copy} | 0.75 (0.25 to 1.25) | 1.25 (0.75 to 1.75) | 1.75 (1.25 to 2.25) | 5 |" in unsynced
    assert [part.count("torch loop") for part in (synced, unsynced)] == [1, 1]


def test_every_cold_rival_is_in_one_table() -> None:
    assert "4.50 (4.00 to 5.00)" in table("inputs on the disk, reading alone")
    assert "8.50 (8.00 to 9.00)" in table("inputs on the disk, both synced")


def test_inputs_that_were_not_all_cached_are_named() -> None:
    lines = [line for line in WITHOUT_GPU if "was cached" in line]
    assert lines == ["\nof inputs of 8 GB only 87.1% was cached when some contestant began"]


def test_alphas_memory_and_start() -> None:
    sweeps = table("alphas in one pass, cold cache")
    assert sweeps.index("| 2 | 2 | 7.50") < sweeps.index("| 3 | 2 | 11.50")
    peaks = table("peak memory")
    assert (
        "| ours, sparse inputs | 1 | 53 | 12 |\n| ours, sparse inputs | 40 | 60 | 12 |\n| a safetensors + torch loop"
        in peaks
    )
    assert "`--help` | 0.75 (0.25 to 1.25)" in table("start-up")


def test_no_word_of_a_gpu_where_none_was_measured() -> None:
    text = "\n".join(WITHOUT_GPU)
    assert "of memcpy's" in text
    assert "GPU" not in text


def test_a_gpu_beside_the_rest() -> None:
    lines = list(make_tables({"benchmarks": FIGURES["benchmarks"] | ON_GPU}))
    assert lines[: -len(list(make_tables({"benchmarks": ON_GPU})))] == WITHOUT_GPU
    assert ROW in lines


def test_a_gpu_alone() -> None:
    title, row, versions = make_tables({"benchmarks": ON_GPU})
    assert "GPU of a test" in title
    assert row == ROW
    assert versions == "\ndriver 1.2, torch 3.4, triton 5.6"


def test_the_figures_of_a_run() -> None:
    stats = {"median": 1.25, "iqr": 0.5, "min": 1.0, "max": 2.0, "rounds": 5, "data": [1.0, 1.25, 2.0]}
    raw = {
        "machine_info": MACHINE,
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "abc", "dirty": True},
        "benchmarks": [{"name": "test_help", "stats": stats, "extra_info": {"more": 1}}],
    }
    figures = extract_figures(raw)
    assert figures["benchmarks"] == {"test_help": {"more": 1, **{k: v for k, v in stats.items() if k != "data"}}}
    assert next(make_report(figures)).endswith("date 2026-01-02, commit abc with changes")


@pytest.mark.parametrize("benchmarks", [FIGURES["benchmarks"], {"test_help": seconds(0.75)}], ids=["all", "little"])
def test_pictures(tmp_path: Path, benchmarks: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    written = draw_pictures({**FIGURES, "benchmarks": benchmarks}, tmp_path / "run")
    assert [path.name for path in written] == ["run-throughput.png", "run-time.png", "run-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
