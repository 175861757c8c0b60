"""Finished work on the disk: a file is there in whole or not at all, and what is there is not done again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .settings import Settings

Row = dict[str, Any]


def rows(path: Path, make: Callable[[], Sequence[Row]]) -> list[Row]:
    """The rows of a JSONL file; made and written first where it is not there."""
    if not path.exists():
        write(path, "".join(json.dumps(row) + "\n" for row in make()))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, text: str) -> None:
    """A text file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def folder(path: Path, fill: Callable[[Path], object]) -> None:
    """A folder, in one step; a no-op where it is there."""
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(path)


def guard(work: Path, settings: Settings) -> None:
    """Keep the settings beside the work. Exits where the work there is of others; alphas may be added."""
    wanted = {key: value for key, value in dataclasses.asdict(settings).items() if not key.startswith("alphas_")}
    path = work / "settings.json"
    if not path.exists():
        write(path, json.dumps(wanted, indent=1) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if differing:
        raise SystemExit(f"{work} holds work of other settings ({', '.join(differing)}): remove it, or name another")
