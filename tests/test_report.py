"""The tables of bench/report.py, from the results that are kept and from a GPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report import tables

RESULTS = json.loads((Path(__file__).parents[1] / "bench" / "results" / "2-cores.json").read_text())
KEPT = {"benchmarks": {name: row for name, row in RESULTS["benchmarks"].items() if not name.startswith("test_gpu[")}}
VERSIONS = {"device": "GPU of a test", "driver": "1.2", "torch": "3.4", "triton": "5.6"}
ON_GPU: dict[str, Any] = {
    "test_gpu[plain-BF16]": {"gb_per_s": 1234.5, "of_roof": 0.98, **VERSIONS},
    "test_gpu[plain-F16]": {"gb_per_s": 1200.0, "of_roof": 0.97, **VERSIONS},
}
ROW = "| plain | 1234.5 (0.98) | 1200.0 (0.97) | not run |"


def test_no_word_of_a_gpu_where_none_was_measured() -> None:
    text = "\n".join(tables(KEPT))
    assert "of memcpy's" in text
    assert "GPU" not in text


def test_a_gpu_beside_the_rest() -> None:
    lines = list(tables({"benchmarks": KEPT["benchmarks"] | ON_GPU}))
    assert lines[: -len(list(tables({"benchmarks": ON_GPU})))] == list(tables(KEPT))
    assert ROW in lines


def test_a_gpu_alone() -> None:
    title, row, versions = tables({"benchmarks": ON_GPU})
    assert "GPU of a test" in title
    assert row == ROW
    assert versions == "\ndriver 1.2, torch 3.4, triton 5.6"
