"""Store the stages of a run on the disk: every file is written whole or not at all, and no stored stage is repeated."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .settings import Settings

Row = dict[str, Any]  # a prompt, its reply, the reply's tokens and reward


def load_rows(path: Path, make: Callable[[], Sequence[Row]]) -> list[Row]:
    """Return the rows of a JSONL file; if it does not exist, make the rows and write them first."""
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in make()))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def make_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder in one step, unless it exists."""
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(path)


def check_settings(work: Path, settings: Settings) -> None:
    """Store the settings in the work folder, and exit if its stages are of other settings; alphas may be added."""
    own = {key: value for key, value in dataclasses.asdict(settings).items() if not key.startswith("alphas_")}
    path = work / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(own, indent=1) + "\n")
    stored = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in own.keys() | stored.keys() if own.get(key) != stored.get(key))
    if differing:
        raise SystemExit(f"{work} has stages of other settings ({', '.join(differing)}): remove it, or name another")
