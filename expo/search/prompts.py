"""Read prompts from a file: JSON Lines, a JSON list as AlpacaEval has it, or lines of text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from ..errors import UsageError
from ..inputs.locations import StrPath

PROMPT_KEYS = ("prompt", "instruction")


def read_prompts(path: StrPath, limit: int | None = None) -> list[str]:
    """Return the prompts of a file.

    A .jsonl file has an object on each line, and a .json file has a list of objects. An object has its prompt under
    "prompt" or "instruction"; in place of an object, a file may have the prompt itself as a string. A file with any
    other suffix has a prompt on each line, and its empty lines are ignored.

    Args:
        path: The file, in UTF-8.
        limit: The number of prompts that are returned at most; None for all.

    Raises:
        UsageError: The file cannot be read or has no prompt; the message names the file and the line.
    """
    path = os.fspath(path)
    if limit is not None and limit < 1:
        raise UsageError(f"`limit` must be at least 1, got {limit}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f"{path}: the prompts cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: the prompts are not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    prompts = list(_parse(path, text))[:limit]
    if not prompts:
        raise UsageError(f"{path}: the file has no prompt")
    return prompts


def _parse(path: str, text: str) -> Iterator[str]:
    """Yield the prompts of a file's text; the suffix of the path names the format."""
    if path.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield _prompt_of(place, _parse_json(place, line))
    elif path.endswith(".json"):
        entries = _parse_json(path, text)
        if not isinstance(entries, list):
            raise UsageError(
                f"{path}: a .json file must have a list, got {type(entries).__name__}; JSON Lines need the suffix "
                ".jsonl"
            )
        for number, entry in enumerate(entries):
            yield _prompt_of(f"{path}, entry {number}", entry)
    else:
        yield from (line.strip() for line in text.split("\n") if line.strip())


def _parse_json(place: str, text: str) -> Any:
    """Return the value of a JSON text. Raises UsageError that names its place in the file."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON: {error}") from error


def _prompt_of(place: str, entry: Any) -> str:
    """Return the prompt of one JSON value. Raises UsageError that names its place in the file."""
    value = next((entry[key] for key in PROMPT_KEYS if key in entry), None) if isinstance(entry, dict) else entry
    if not isinstance(value, str) or not value.strip():
        content = f"keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else type(entry).__name__
        raise UsageError(f'{place}: needs a text as "prompt" or "instruction", got {content}')
    return value
