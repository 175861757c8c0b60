"""From pytest-benchmark's JSON to what is kept: python bench/report.py RAW.json [KEPT.json]

Prints the tables that the README shows; writes medians, spreads and extra figures, without the single rounds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RIVALS = {
    "test_warm[copying]": "`cat` of sft and a copy of aligned by the faster of `cp` and `dd oflag=direct`",
    "test_warm[short_program]": "the best short plain-PyTorch program, its import of torch not counted",
    "test_warm[torch_loop]": "a safetensors + torch loop over the tensors",
    "test_cold": "cold cache: `cat` of both inputs",
    "test_three_alphas_cold": "cold cache, three alphas in one pass: three merges",
}


def keep(raw: dict[str, Any]) -> dict[str, Any]:
    """Machine, commit, and each benchmark's figures; times in seconds."""
    return {
        "machine": raw["machine_info"],
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"]["id"] + (" with changes" if raw["commit_info"]["dirty"] else ""),
        "benchmarks": {
            bench["name"]: {
                **{key: round(bench["stats"][key], 6) for key in ("median", "iqr", "min", "max", "rounds")},
                **bench["extra_info"],
            }
            for bench in raw["benchmarks"]
        },
    }


def tables(kept: dict[str, Any]) -> Iterator[str]:
    """Markdown; of the GPU's benchmarks too, or alone, where they have been run."""
    benches = kept["benchmarks"]
    if "test_help" in benches:
        yield from _merges(benches)
    yield from _rates(benches, "test_kernel", "one thread, GB/s moved (of memcpy's)", "of_memcpy")
    on_gpu = next((bench for name, bench in benches.items() if name.startswith("test_gpu[")), None)
    if on_gpu:
        yield from _rates(benches, "test_gpu", f"on a GPU, {on_gpu['device']}, GB/s moved (of a copy's)", "of_roof")
        yield f"\ndriver {on_gpu['driver']}, torch {on_gpu['torch']}, triton {on_gpu['triton']}"


def _merges(benches: dict[str, Any]) -> Iterator[str]:
    yield "| against | rival, s | ours, s | ours / rival (lowest to highest) |\n|---|---|---|---|"
    for name, rival in RIVALS.items():
        b = benches[name]
        spread = f"{b['ratio_median']:.2f} ({b['ratio_min']:.2f} to {b['ratio_max']:.2f})"
        yield f"| {rival} | {b['rival_median_s']:.2f} | {b['median']:.2f} | {spread} |"
    memory = benches["test_peak_memory"]
    yield f"\npeak resident memory {memory['resident_mb']:.0f} MB, of which anonymous {memory['anonymous_mb']:.0f} MB"
    start, plan = benches["test_help"]["median"], benches["test_plan_70b"]["median"]
    yield f"--help {start:.3f} s, --plan of a 70B pair {plan:.3f} s"


def _rates(benches: dict[str, Any], test: str, title: str, ratio: str) -> Iterator[str]:
    """What each contestant of a test moves in a second; nothing where the test has not been run."""
    names = [name[len(test) + 1 : -len("-BF16]")] for name in benches if re.fullmatch(rf"{test}\[.*-BF16\]", name)]
    if names:
        yield f"\n| {title} | bf16 | fp16 | fp32 |\n|---|---|---|---|"
    for name in names:
        rows = [benches.get(f"{test}[{name}-{dtype}]") for dtype in ("BF16", "F16", "F32")]
        cells = [f"{row['gb_per_s']:.1f} ({row[ratio]:.2f})" if row else "not run" for row in rows]
        yield f"| {name.replace('_', ' ')} | {' | '.join(cells)} |"


if __name__ == "__main__":
    kept = keep(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(tables(kept)))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(kept, indent=1) + "\n")
