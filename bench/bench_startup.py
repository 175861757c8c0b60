"""How long does a command take before it moves any weights, compared with an import of torch?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.rivals import ROOT, run

STARTUP_ROUNDS = 7
PLANNED_TENSORS = 723  # the number of tensors of Llama-2-70B


def test_help(benchmark: Any) -> None:
    """Time `--help`, which imports little beside the parser."""
    benchmark.group = "start-up"
    command = (sys.executable, "-m", "expo.fast", "--help")
    benchmark.pedantic(lambda: run(*command), rounds=STARTUP_ROUNDS, warmup_rounds=1)


def test_plan_70b(benchmark: Any, pair_70b: Path) -> None:
    """Time the plan of 2 x 15 shards, which reads their headers."""
    inputs = ("--sft", pair_70b / "sft", "--aligned", pair_70b / "aligned", "--alpha", "0.5", "--out", pair_70b / "out")

    def plan() -> None:
        command = [sys.executable, "-m", "expo.fast", *map(str, inputs), "--plan"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 4), done.stderr  # 4: the plan is printed, and the disk is smaller than the model
        assert done.stdout.count("extrapolate") == PLANNED_TENSORS

    benchmark.group = "start-up"
    benchmark.pedantic(plan, rounds=STARTUP_ROUNDS, warmup_rounds=1)


def test_import_torch(benchmark: Any) -> None:
    """Time the import of torch, with which every program that uses torch begins."""
    benchmark.group = "start-up"
    command = (sys.executable, "-c", "import torch")
    benchmark.pedantic(lambda: run(*command), rounds=STARTUP_ROUNDS, warmup_rounds=1)
