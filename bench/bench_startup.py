"""What a command costs before it does anything, with the import of torch as the yardstick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.rivals import ROOT, run

ROUNDS = 7


def test_help(benchmark: Any) -> None:
    benchmark.group = "start-up"
    benchmark.pedantic(lambda: run(sys.executable, "-m", "expo.fast", "--help"), rounds=ROUNDS, warmup_rounds=1)


def test_plan_70b(benchmark: Any, pair_70b: Path) -> None:
    """Headers of 2 x 15 shards, 723 tensors each."""
    inputs = ("--sft", pair_70b / "sft", "--aligned", pair_70b / "aligned", "--alpha", "0.5", "--out", pair_70b / "out")

    def plan() -> None:
        command = [sys.executable, "-m", "expo.fast", *map(str, inputs), "--plan"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 4), done.stderr  # 4: the plan is printed, and the disk is smaller than the model
        assert done.stdout.count("extrapolate") == 723

    benchmark.group = "start-up"
    benchmark.pedantic(plan, rounds=ROUNDS, warmup_rounds=1)


def test_import_torch(benchmark: Any) -> None:
    """The yardstick: what every program that uses torch pays first."""
    benchmark.group = "start-up"
    benchmark.pedantic(lambda: run(sys.executable, "-c", "import torch"), rounds=ROUNDS, warmup_rounds=1)
