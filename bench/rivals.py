"""Time the rivals of a merge, which are programs that people use today, and the command of a merge.

A rival reads pair/sft and pair/aligned, writes pair/out, and returns seconds by name. The end of a name tells what the
seconds include. `_unsynced` seconds end with the program, when its output may still be in the page cache only.
`_synced` seconds include an fsync of every file and of the folder. A merge always syncs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ALPHA = 0.3
ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).with_name("rival_programs.py")
Times = dict[str, float]  # the seconds, by name
Rival = Callable[[Path], Times]


def run(*command: object) -> str:
    """Run a command in the checkout and return its stdout; it must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def find_shards(*folders: Path) -> list[Path]:
    """Return the weight files of folders."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def remove_outputs(pair: Path) -> None:
    """Delete the outputs of earlier rounds, and sync, so that no earlier write takes part in the next round."""
    for old in pair.glob("out*"):
        shutil.rmtree(old)
    os.sync()


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def expo_command(pair: Path, *alphas: float, out: str = "out") -> list[object]:
    """Return the command of a merge."""
    inputs = ("--sft", pair / "sft", "--aligned", pair / "aligned")
    return [sys.executable, "-m", "expo.fast", *inputs, "--out", pair / out, "--quiet", "--alpha", *alphas]


def program_command(program: str, pair: Path) -> list[object]:
    """Return the command of a rival program."""
    return [sys.executable, "-W", "ignore", PROGRAMS, program, pair / "sft", pair / "aligned", ALPHA, pair / "out"]


def expo(pair: Path, *alphas: float, out: str = "out") -> None:
    """Merge by the command line, which syncs."""
    run(*expo_command(pair, *alphas, out=out))


def cat(*folders: Path) -> None:
    """Read all weight files of folders."""
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *map(str, find_shards(*folders))], stdout=null, check=True)


def sync(folder: Path) -> None:
    """Sync a folder and its files, as a merge does."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def add_sync(name: str, pair: Path, unsynced: float) -> Times:
    """Sync the output of a program that has just ended; return its seconds without and with the sync."""
    return {
        f"{name}_unsynced": unsynced,
        f"{name}_synced": unsynced + measure_seconds(lambda: sync(pair / "out")),
    }


def cat_and_cp(pair: Path) -> Times:
    """Read sft with cat, and copy aligned with cp."""

    def work() -> None:
        cat(pair / "sft")
        (pair / "out").mkdir()
        run("cp", *find_shards(pair / "aligned"), pair / "out")

    return add_sync("cp", pair, measure_seconds(work))


def cat_and_dd(pair: Path) -> Times:
    """Read sft with cat, and copy aligned past the page cache with dd, which syncs each file itself."""

    def work() -> None:
        cat(pair / "sft")
        (pair / "out").mkdir()
        for path in find_shards(pair / "aligned"):
            flags = ("bs=8M", "oflag=direct", "conv=fsync", "status=none")
            run("dd", f"if={path}", f"of={pair / 'out' / path.name}", *flags)

    return {"dd_direct_synced": measure_seconds(work)}


def read_both(pair: Path) -> Times:
    """Read both inputs and write nothing."""
    return {"read_both": measure_seconds(lambda: cat(pair / "sft", pair / "aligned"))}


def short(pair: Path) -> Times:
    """Run the short PyTorch program; return its seconds, and those without its start and its import of torch."""
    start = time.perf_counter()
    own = float(run(*program_command("short", pair)))
    whole = add_sync("short", pair, time.perf_counter() - start)
    before = whole["short_unsynced"] - own
    return whole | {name.replace("short", "short_without_import"): value - before for name, value in whole.items()}


def loop(pair: Path) -> Times:
    """Run the loop over tensors."""
    return add_sync("loop", pair, measure_seconds(lambda: run(*program_command("loop", pair))))


def paper(pair: Path) -> Times:
    """Run the steps of the paper's script."""
    pytest.importorskip("transformers", reason="the paper's script needs transformers")
    return add_sync("paper", pair, measure_seconds(lambda: run(*program_command("paper", pair))))


def mergekit(pair: Path) -> Times:
    """Run mergekit's task arithmetic: sft plus (1 + alpha) times the difference of aligned."""
    program = shutil.which("mergekit-yaml")
    if program is None:
        pytest.skip("mergekit is not installed")
    config = pair / "mergekit.yml"
    models = [{"model": str(pair / "aligned"), "parameters": {"weight": 1 + ALPHA}}]
    base = {"merge_method": "task_arithmetic", "base_model": str(pair / "sft"), "dtype": "bfloat16"}
    config.write_text(json.dumps({**base, "models": models}))  # JSON is YAML
    return add_sync("mergekit", pair, measure_seconds(lambda: run(program, config, pair / "out")))
