"""Prompts from a file: JSON Lines, a JSON list as AlpacaEval has it, or lines of text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import UsageError
from ..inputs.resolve import StrPath

KEYS = ("prompt", "instruction")


def read_prompts(path: StrPath, limit: int | None = None) -> list[str]:
    """The prompts of a file, the first `limit` of them.

    .jsonl: an object a line, .json: a list of them; each has the prompt as "prompt" or "instruction", or is a string.
    Any other suffix: text, a prompt a line, empty lines left out. Raises UsageError with the file and the line.
    """
    path = os.fspath(path)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f"{path}: the prompts cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: the prompts are not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    prompts = list(_prompts(path, text))[:limit]
    if not prompts:
        raise UsageError(f"{path}: there is no prompt in it")
    return prompts


def _prompts(path: str, text: str) -> Iterator[str]:
    if path.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), 1)
        yield from _texts((f"{path}, line {number}", line) for number, line in lines if line.strip())
    elif path.endswith(".json"):
        entries = _loaded(path, text)
        if not isinstance(entries, list):
            raise UsageError(f"{path}: a list is needed, got {type(entries).__name__}; name JSON Lines .jsonl")
        yield from (_prompt(f"{path}, entry {number}", entry) for number, entry in enumerate(entries))
    else:
        yield from (line.strip() for line in text.split("\n") if line.strip())


def _texts(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    for where, line in lines:
        yield _prompt(where, _loaded(where, line))


def _loaded(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}") from error


def _prompt(where: str, entry: Any) -> str:
    value = next((entry[key] for key in KEYS if key in entry), None) if isinstance(entry, dict) else entry
    if not isinstance(value, str) or not value.strip():
        has = f"keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else type(entry).__name__
        raise UsageError(f'{where}: needs a text as "prompt" or "instruction", got {has}')
    return value
