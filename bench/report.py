"""From pytest-benchmark's JSON to what is kept: python -m bench.report RAW.json [KEPT.json]

Prints the machine and the tables that docs/performance.md shows; writes medians, spreads and extra figures, without
the single rounds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SYNCED, UNSYNCED = "_synced", "_unsynced"
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


def keep(raw: dict[str, Any]) -> dict[str, Any]:
    """Return machine, commit, and each benchmark's figures, times in seconds; missing: those that have no round."""
    done = [bench for bench in raw["benchmarks"] if bench.get("stats", {}).get("rounds")]
    return {
        "machine": raw["machine_info"],
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"]["id"] + (" with changes" if raw["commit_info"]["dirty"] else ""),
        "benchmarks": {
            bench["name"]: {
                **{key: round(bench["stats"][key], 6) for key in ("median", "iqr", "min", "max", "rounds")},
                **bench.get("extra_info", {}),
            }
            for bench in done
        },
        "missing": [bench["name"] for bench in raw["benchmarks"] if bench not in done],
    }


def report(kept: dict[str, Any]) -> Iterator[str]:
    """Where and what was measured, and the tables."""
    yield ", ".join(f"{name} {value}" for name, value in machine(kept).items())
    yield from tables(kept)


def machine(kept: dict[str, Any]) -> dict[str, Any]:
    return {**kept["machine"], "date": kept["date"], "commit": kept["commit"]}


def tables(kept: dict[str, Any]) -> Iterator[str]:
    """Markdown, of what has been run; medians, lowest and highest in brackets."""
    benches = kept["benchmarks"]
    yield from (f"not measured: {name}" for name in kept.get("missing", ()))
    warm, cold = (named(benches, test) for test in (r"test_warm(_slow)?", "test_cold"))
    yield from _merges(warm, SYNCED, "inputs cached, both synced to the disk")
    yield from _merges(warm, UNSYNCED, "inputs cached, ours synced and the rival not")
    yield from _residency(warm)
    yield from _merges(cold, SYNCED, "inputs on the disk, both synced")
    yield from _merges(cold, "", "inputs on the disk, reading alone")
    yield from _sweeps(named(benches, "test_sweep"))
    yield from _memory(benches)
    yield from _start(benches)
    yield from _rates(benches, "test_kernel", "one thread, GB/s moved (of memcpy's)", "of_memcpy")
    on_gpu = next(
        (bench for name, bench in benches.items() if name.startswith("test_gpu[") and "device" in bench), None
    )
    if on_gpu:
        yield from _rates(benches, "test_gpu", f"on a GPU, {on_gpu['device']}, GB/s moved (of a copy's)", "of_roof")
        yield f"\ndriver {on_gpu['driver']}, torch {on_gpu['torch']}, triton {on_gpu['triton']}"


def named(benches: dict[str, Row], test: str, first: str = "") -> list[Row]:
    """The rows of a test, its parameters beginning with `first`, by the size of the checkpoint."""
    rows = [row for name, row in benches.items() if re.fullmatch(rf"{test}\[{first}.*\]", name)]
    return sorted(rows, key=lambda row: row.get("checkpoint_bytes", 0))


def rivals(row: Row, ending: str) -> dict[str, Row]:
    """A row's rivals whose seconds end in the given way, without the ending; "": those that do not write."""
    found = row.get("rivals", {}).items()
    if not ending:
        return {name: rival for name, rival in found if not name.endswith((SYNCED, UNSYNCED))}
    return {name.removesuffix(ending): rival for name, rival in found if name.endswith(ending)}


def _spread(row: Row, of: str = "") -> str:
    return f"{row[of + 'median']:.2f} ({row[of + 'min']:.2f} to {row[of + 'max']:.2f})"


def _merges(rows: list[Row], ending: str, title: str) -> Iterator[str]:
    lines = [
        f"| {RIVALS[name]} | {row['checkpoint_bytes'] / 1e9:.2g} | {_spread(rival)} | {_spread(row)} "
        f"| {_spread(rival, 'ratio_')} | {row['rounds']} |"
        for name in RIVALS
        for row in rows
        for found, rival in rivals(row, ending).items()
        if found == name
    ]
    if lines:
        yield f"\n| {title} | GB of a checkpoint | rival, s | ours, s | ours / rival | rounds |"
        yield from ("|---|---|---|---|---|---|", *lines)


def _residency(rows: list[Row]) -> Iterator[str]:
    """A line for each size whose inputs were not wholly in the page cache whenever a contestant began."""
    least = {row["checkpoint_bytes"]: 1.0 for row in rows}
    for row in rows:
        least[row["checkpoint_bytes"]] = min(least[row["checkpoint_bytes"]], row["inputs_resident_min"])
    for size, share in least.items():
        if share < 0.999:
            yield f"\nof inputs of {size / 1e9:.2g} GB only {share:.1%} was cached when some contestant began"


def _sweeps(rows: list[Row]) -> Iterator[str]:
    if rows:
        yield "\n| alphas in one pass, cold cache | GB of a checkpoint | K merges, s | one pass, s | ratio | rounds |"
        yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row["alphas"]):
        merges = row["rivals"]["separate_merges"]
        cells = (_spread(merges), _spread(row), _spread(merges, "ratio_"), row["rounds"])
        yield f"| {row['alphas']} | {row['checkpoint_bytes'] / 1e9:.2g} | {' | '.join(map(str, cells))} |"


def _memory(benches: dict[str, Row]) -> Iterator[str]:
    rows = [("ours, sparse inputs", row) for row in named(benches, "test_peak_memory")]
    for program, words in {"expo": "ours", **RIVALS}.items():
        rows += [(words, row) for row in named(benches, "test_memory_of_programs", f"{program}-")]
    if rows:
        yield "\n| peak memory | GB of a checkpoint | resident, MB | anonymous, MB |\n|---|---|---|---|"
    for who, row in rows:
        size = row["checkpoint_bytes"] / 1e9
        yield f"| {who} | {size:.2g} | {row['resident_mb']:.0f} | {row['anonymous_mb']:.0f} |"


def _start(benches: dict[str, Row]) -> Iterator[str]:
    words = {"test_help": "`--help`", "test_plan_70b": "`--plan` of a 70B pair", "test_import_torch": "`import torch`"}
    if not words.keys() <= benches.keys():
        return
    yield "\n| start-up | s |\n|---|---|"
    yield from (f"| {what} | {_spread(benches[name])} |" for name, what in words.items())


def _rates(benches: dict[str, Row], test: str, title: str, ratio: str) -> Iterator[str]:
    """What each contestant of a test moves in a second; nothing where the test has not been run."""
    names = [name[len(test) + 1 : -len("-BF16]")] for name in benches if re.fullmatch(rf"{test}\[.*-BF16\]", name)]
    if names:
        yield f"\n| {title} | bf16 | fp16 | fp32 |\n|---|---|---|---|"
    for name in names:
        rows = [benches.get(f"{test}[{name}-{dtype}]") for dtype in ("BF16", "F16", "F32")]
        cells = [f"{row['gb_per_s']:.1f} ({row[ratio]:.2f})" if row and ratio in row else "not run" for row in rows]
        yield f"| {name.replace('_', ' ')} | {' | '.join(cells)} |"


if __name__ == "__main__":
    kept = keep(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(report(kept)))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(kept, indent=1) + "\n")
