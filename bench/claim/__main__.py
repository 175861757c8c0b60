"""The command line: python -m bench.claim --model smollm2 --seeds 3 reproduces the paper's claim on a CPU.

SmolLM2-135M-Instruct writes replies, and DPO trains it on the most and the least cheerful ones. The checkpoint after
20% of the steps and the last one are extrapolated with every alpha, and judged by prompts about things that the
training never mentioned. The work folder stores every stage, and a run that was interrupted continues with them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import settings


def main() -> None:
    """Read the options and run the experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.claim", description="Reproduce the paper's claim on a CPU: a reward against alpha."
    )
    parser.add_argument("--model", choices=["smollm2", "demo"], default="smollm2")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings, each with data of its own")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="the folder of the JSON and the plot")
    parser.add_argument("--work", type=Path, help="the folder of the stages (default: build/<name>)")
    parser.add_argument("--quick", action="store_true", help="run everything in minutes; the figures mean nothing")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    # Threads that wait in a loop take the time of other threads if they share cores. libgomp reads this variable when
    # torch loads it, so it must be set before the next import.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from .run import run

    chosen = settings.choose(options.model, options.quick)
    run(chosen, options.seeds, options.work or Path("build") / chosen.name, options.out)


if __name__ == "__main__":
    main()
