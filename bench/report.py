"""From pytest-benchmark's JSON to what is kept: python bench/report.py RAW.json [KEPT.json]

Prints the tables that the README shows; writes medians, spreads and extra figures, without the single rounds.
"""

from __future__ import annotations

import json
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
    """Markdown."""
    benches = kept["benchmarks"]
    yield "| against | rival, s | ours, s | ours / rival (lowest to highest) |\n|---|---|---|---|"
    for name, rival in RIVALS.items():
        b = benches[name]
        spread = f"{b['ratio_median']:.2f} ({b['ratio_min']:.2f} to {b['ratio_max']:.2f})"
        yield f"| {rival} | {b['rival_median_s']:.2f} | {b['median']:.2f} | {spread} |"
    memory = benches["test_peak_memory"]
    yield f"\npeak resident memory {memory['resident_mb']:.0f} MB, of which anonymous {memory['anonymous_mb']:.0f} MB"
    start, plan = benches["test_help"]["median"], benches["test_plan_70b"]["median"]
    yield f"--help {start:.3f} s, --plan of a 70B pair {plan:.3f} s"
    yield "\n| one thread, GB/s moved (of memcpy's) | bf16 | fp16 | fp32 |\n|---|---|---|---|"
    contestants = [name[len("test_kernel[") : -len("-BF16]")] for name in benches if name.endswith("-BF16]")]
    for contestant in contestants:
        rows = [benches[f"test_kernel[{contestant}-{dtype}]"] for dtype in ("BF16", "F16", "F32")]
        cells = [f"{row['gb_per_s']:.1f} ({row['of_memcpy']:.2f})" for row in rows]
        yield f"| {contestant.replace('_', ' ')} | {' | '.join(cells)} |"


if __name__ == "__main__":
    kept = keep(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(tables(kept)))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(kept, indent=1) + "\n")
