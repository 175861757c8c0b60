"""Merging and copying a pair of checkpoints as people do it today, timed; and ours, as typed.

A rival works from pair/sft and pair/aligned to pair/out and returns seconds by name. A name ends with what is timed:
`_unsynced` until the program ends, what it wrote being in the page cache; `_synced` until that is on the disk too, by
fsync of every file and the folder. Ours always syncs.
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
BASELINES = Path(__file__).with_name("baselines.py")
ROOT = BASELINES.parents[1]
Times = dict[str, float]
Rival = Callable[[Path], Times]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shards(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def fresh(pair: Path) -> Path:
    """A path that does not exist; what earlier rounds wrote is on the disk, out of the way."""
    for old in pair.glob("out*"):
        shutil.rmtree(old)
    os.sync()
    return pair / "out"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def expo_command(pair: Path, *alphas: float, out: str = "out") -> list[object]:
    inputs = ("--sft", pair / "sft", "--aligned", pair / "aligned")
    return [sys.executable, "-m", "expo.fast", *inputs, "--out", pair / out, "--quiet", "--alpha", *alphas]


def baseline_command(program: str, pair: Path) -> list[object]:
    return [sys.executable, "-W", "ignore", BASELINES, program, pair / "sft", pair / "aligned", ALPHA, pair / "out"]


def expo(pair: Path, *alphas: float, out: str = "out") -> None:
    """The command line, synced."""
    run(*expo_command(pair, *alphas, out=out))


def cat(*folders: Path) -> None:
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *map(str, shards(*folders))], stdout=null, check=True)


def sync(folder: Path) -> None:
    """fsync of a folder and its files, as a merge does it."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def both(name: str, pair: Path, unsynced: float) -> Times:
    """To be called as soon as a program has ended: its seconds, and those with the sync."""
    return {f"{name}_unsynced": unsynced, f"{name}_synced": unsynced + seconds(lambda: sync(pair / "out"))}


def cat_and_cp(pair: Path) -> Times:
    """sft read, and aligned copied by cp."""

    def work() -> None:
        cat(pair / "sft")
        (pair / "out").mkdir()
        run("cp", *shards(pair / "aligned"), pair / "out")

    return both("cp", pair, seconds(work))


def cat_and_dd(pair: Path) -> Times:
    """sft read, and aligned copied past the page cache; dd syncs each file itself."""

    def work() -> None:
        cat(pair / "sft")
        (pair / "out").mkdir()
        for path in shards(pair / "aligned"):
            flags = ("bs=8M", "oflag=direct", "conv=fsync", "status=none")
            run("dd", f"if={path}", f"of={pair / 'out' / path.name}", *flags)

    return {"dd_direct_synced": seconds(work)}


def read_both(pair: Path) -> Times:
    """Nothing is written."""
    return {"read_both": seconds(lambda: cat(pair / "sft", pair / "aligned"))}


def short(pair: Path) -> Times:
    """The best short plain-PyTorch program; as a whole, and without its start and its import of torch."""
    began = time.perf_counter()
    own = float(run(*baseline_command("short", pair)))
    whole = both("short", pair, time.perf_counter() - began)
    start = whole["short_unsynced"] - own
    return whole | {name.replace("short", "short_without_import"): value - start for name, value in whole.items()}


def loop(pair: Path) -> Times:
    return both("loop", pair, seconds(lambda: run(*baseline_command("loop", pair))))


def paper(pair: Path) -> Times:
    pytest.importorskip("transformers", reason="the paper's script needs transformers")
    return both("paper", pair, seconds(lambda: run(*baseline_command("paper", pair))))


def mergekit(pair: Path) -> Times:
    """Task arithmetic over sft: weight 1 + alpha of aligned's difference."""
    program = shutil.which("mergekit-yaml")
    if program is None:
        pytest.skip("mergekit is not installed")
    config = pair / "mergekit.yml"
    models = [{"model": str(pair / "aligned"), "parameters": {"weight": 1 + ALPHA}}]
    base = {"merge_method": "task_arithmetic", "base_model": str(pair / "sft"), "dtype": "bfloat16"}
    config.write_text(json.dumps({**base, "models": models}))  # JSON is YAML
    return both("mergekit", pair, seconds(lambda: run(program, config, pair / "out")))
