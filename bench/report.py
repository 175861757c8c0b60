"""Turn pytest-benchmark's JSON into the tables of docs/performance.md: python -m bench.report RAW.json [FIGURES.json]

The command prints the machine and the tables. FIGURES.json gets medians, spreads and the extra figures of every
benchmark, without the single rounds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # the figures of one benchmark
SYNCED, UNSYNCED = "_synced", "_unsynced"  # the ends of the names of a rival's seconds; rivals.py explains them
RIVALS = {
    "cp": "`cat` of sft and `cp` of aligned",
    "dd_direct": "`cat` of sft and `dd oflag=direct` of aligned",
    "short": "the best short plain-PyTorch program",
    "short_without_import": "the same, its start and import of torch not counted",
    "loop": "a safetensors + torch loop over the tensors",
    "paper": "the paper's script, through transformers",
    "mergekit": "mergekit, task arithmetic",
    "read_both": "`cat` of both inputs, nothing written",
}
ALL_CACHED = 0.999  # the inputs count as cached if at least this share of them is in the page cache


def extract_figures(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the machine, the commit, every benchmark's figures in seconds, and the names of those without a round."""
    measured = [bench for bench in raw["benchmarks"] if bench.get("stats", {}).get("rounds")]
    return {
        "machine": raw["machine_info"],
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"]["id"] + (" with changes" if raw["commit_info"]["dirty"] else ""),
        "benchmarks": {
            bench["name"]: {
                **{key: round(bench["stats"][key], 6) for key in ("median", "iqr", "min", "max", "rounds")},
                **bench.get("extra_info", {}),
            }
            for bench in measured
        },
        "missing": [bench["name"] for bench in raw["benchmarks"] if bench not in measured],
    }


def make_report(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the report: the machine and the tables."""
    machine = {**figures["machine"], "date": figures["date"], "commit": figures["commit"]}
    yield ", ".join(f"{name} {value}" for name, value in machine.items())
    yield from make_tables(figures)


def make_tables(figures: dict[str, Any]) -> Iterator[str]:
    """Yield a Markdown table for each benchmark that has run: medians, with the lowest and the highest value."""
    rows = figures["benchmarks"]
    yield from (f"not measured: {name}" for name in figures.get("missing", ()))
    warm, cold = (select_rows(rows, test) for test in (r"test_warm(_slow)?", "test_cold"))
    yield from _merge_table(warm, SYNCED, "inputs cached, both synced to the disk")
    yield from _merge_table(warm, UNSYNCED, "inputs cached, ours synced and the rival not")
    yield from _residency_lines(warm)
    yield from _merge_table(cold, SYNCED, "inputs on the disk, both synced")
    yield from _merge_table(cold, "", "inputs on the disk, reading alone")
    yield from _sweep_table(select_rows(rows, "test_sweep"))
    yield from _memory_table(rows)
    yield from _startup_table(rows)
    yield from _rate_table(rows, "test_kernel", "one thread, GB/s moved (of memcpy's)", "of_memcpy")
    on_gpu = next((row for name, row in rows.items() if name.startswith("test_gpu[") and "device" in row), None)
    if on_gpu:
        yield from _rate_table(rows, "test_gpu", f"on a GPU, {on_gpu['device']}, GB/s moved (of a copy's)", "of_roof")
        yield f"\ndriver {on_gpu['driver']}, torch {on_gpu['torch']}, triton {on_gpu['triton']}"


def select_rows(rows: dict[str, Row], test: str, first: str = "") -> list[Row]:
    """Return the rows of a test whose parameters begin with `first`, by the size of the checkpoint."""
    selected = [row for name, row in rows.items() if re.fullmatch(rf"{test}\[{first}.*\]", name)]
    return sorted(selected, key=lambda row: row.get("checkpoint_bytes", 0))


def select_rivals(row: Row, ending: str) -> dict[str, Row]:
    """Return a row's rivals whose seconds end in SYNCED or UNSYNCED, or in neither for "", without this ending."""
    rivals = row.get("rivals", {}).items()
    if not ending:
        return {name: rival for name, rival in rivals if not name.endswith((SYNCED, UNSYNCED))}
    return {name.removesuffix(ending): rival for name, rival in rivals if name.endswith(ending)}


def _spread(row: Row, prefix: str = "") -> str:
    return f"{row[prefix + 'median']:.2f} ({row[prefix + 'min']:.2f} to {row[prefix + 'max']:.2f})"


def _gigabytes(row: Row) -> str:
    return f"{row['checkpoint_bytes'] / 1e9:.2g}"


def _merge_table(rows: list[Row], ending: str, title: str) -> Iterator[str]:
    """Yield the table of merges against rivals."""
    lines = [
        f"| {RIVALS[name]} | {_gigabytes(row)} | {_spread(rivals[name])} | {_spread(row)} "
        f"| {_spread(rivals[name], 'ratio_')} | {row['rounds']} |"
        for name in RIVALS
        for row in rows
        if name in (rivals := select_rivals(row, ending))
    ]
    if lines:
        yield f"\n| {title} | GB of a checkpoint | rival, s | ours, s | ours / rival | rounds |"
        yield from ("|---|---|---|---|---|---|", *lines)


def _residency_lines(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each size whose inputs were not wholly in the page cache when some contestant started."""
    least = {row["checkpoint_bytes"]: 1.0 for row in rows}
    for row in rows:
        least[row["checkpoint_bytes"]] = min(least[row["checkpoint_bytes"]], row["inputs_resident_min"])
    for size, share in least.items():
        if share < ALL_CACHED:
            yield f"\nof inputs of {size / 1e9:.2g} GB only {share:.1%} was cached when some contestant began"


def _sweep_table(rows: list[Row]) -> Iterator[str]:
    """Yield the table of several alphas in one pass."""
    if rows:
        yield "\n| alphas in one pass, cold cache | GB of a checkpoint | K merges, s | one pass, s | ratio | rounds |"
        yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row["alphas"]):
        merges = row["rivals"]["separate_merges"]
        cells = (_gigabytes(row), _spread(merges), _spread(row), _spread(merges, "ratio_"), row["rounds"])
        yield f"| {row['alphas']} | {' | '.join(map(str, cells))} |"


def _memory_table(rows: dict[str, Row]) -> Iterator[str]:
    """Yield the table of peaks of memory."""
    peaks = [("ours, sparse inputs", row) for row in select_rows(rows, "test_peak_memory")]
    for program, words in {"expo": "ours", **RIVALS}.items():
        peaks += [(words, row) for row in select_rows(rows, "test_memory_of_programs", f"{program}-")]
    if peaks:
        yield "\n| peak memory | GB of a checkpoint | resident, MB | anonymous, MB |\n|---|---|---|---|"
    for words, row in peaks:
        yield f"| {words} | {_gigabytes(row)} | {row['resident_mb']:.0f} | {row['anonymous_mb']:.0f} |"


def _startup_table(rows: dict[str, Row]) -> Iterator[str]:
    """Yield the table of start-up times."""
    words = {"test_help": "`--help`", "test_plan_70b": "`--plan` of a 70B pair", "test_import_torch": "`import torch`"}
    if not words.keys() <= rows.keys():
        return
    yield "\n| start-up | s |\n|---|---|"
    yield from (f"| {text} | {_spread(rows[name])} |" for name, text in words.items())


def _rate_table(rows: dict[str, Row], test: str, title: str, ratio: str) -> Iterator[str]:
    """Yield the table of the GB that each contestant of a test moves in a second; no table if the test has not run."""
    names = [name[len(test) + 1 : -len("-BF16]")] for name in rows if re.fullmatch(rf"{test}\[.*-BF16\]", name)]
    if names:
        yield f"\n| {title} | bf16 | fp16 | fp32 |\n|---|---|---|---|"
    for name in names:
        dtypes = [rows.get(f"{test}[{name}-{dtype}]") for dtype in ("BF16", "F16", "F32")]
        cells = [f"{row['gb_per_s']:.1f} ({row[ratio]:.2f})" if row and ratio in row else "not run" for row in dtypes]
        yield f"| {name.replace('_', ' ')} | {' | '.join(cells)} |"


if __name__ == "__main__":
    figures = extract_figures(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(make_report(figures)))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(figures, indent=1) + "\n")
