"""The paper's claim on one's own CPU: `python -m bench.claim --model smollm2 --seeds 3`.

SmolLM2-135M-Instruct writes replies; DPO trains it towards the cheerful ones; the checkpoint after 20% of the steps and
the last one are extrapolated with every alpha, and judged on prompts about things that training never mentioned.
Every stage is kept in the work folder, and a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import settings


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.claim", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["smollm2", "demo"], default="smollm2")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings, each from data of its own")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON and the plot")
    parser.add_argument("--work", type=Path, help="folder of the stages (default: build/<name>)")
    parser.add_argument("--quick", action="store_true", help="see whether everything works; no figures to quote")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    # Threads that wait for each other by spinning stand in each other's way where cores are shared. libgomp reads this
    # when torch loads it: before what is imported next.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from .run import run

    chosen = settings.of(options.model, options.quick)
    run(chosen, options.seeds, options.work or Path("build") / chosen.name, options.out)


if __name__ == "__main__":
    main()
