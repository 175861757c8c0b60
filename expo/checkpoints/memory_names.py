"""The names that transformers gives in memory to the tensors of a model's files.

The two differ for many models: a state dict from memory (FSDP, accelerate, `zero_to_fp32.py`) then has other names than
the files of `save_pretrained`, which writes the names that the published checkpoint has. The table memory_names.json is
generated from transformers' own renames; see tests/architectures/memory_names.py. A name in memory stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from .naming import unwrap

TABLE = os.path.join(os.path.dirname(__file__), "memory_names.json")


class _Rename(NamedTuple):
    """One rename of a model.

    Attributes:
        scope: The prefix of the part of the model that the rename belongs to; "" for the whole model.
        base: A prefix that may stand before the scope.
        pattern: An expression for the text that is replaced. It has named groups, one for each form of the text.
        replacement: The new text, in which `\\1` is the first group inside the named group.
    """

    scope: str
    base: str
    pattern: re.Pattern[str]
    replacement: str

    def apply(self, name: str) -> str:
        """Return the renamed name; the same name if the rename does not apply."""
        prefix = next((each for each in (self.base + self.scope, self.scope) if name.startswith(each)), None)
        rest = name[len(prefix or "") :]
        match = None if prefix is None else self.pattern.search(rest)
        if match is None or match.lastgroup is None:
            return name
        text = self.replacement
        if r"\1" in text:
            text = text.replace(r"\1", match.group(self.pattern.groupindex[match.lastgroup] + 1))
        return f"{prefix}{rest.replace(match.group(0), text, 1)}"


class MemoryNames:
    """The names in memory of the tensors of one model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        named, model_type = config.get("architectures"), config.get("model_type")
        first = named[0] if isinstance(named, list) and named else None
        key = f"{first} {model_type}"
        self._renames = _renames_of(key if key in _table() else _same_type().get(str(model_type), ""))

    def __bool__(self) -> bool:
        return bool(self._renames)

    def find(self, name: str) -> str:
        """Return the name in memory of a tensor of a file, without a wrapper's prefixes."""
        short = unwrap(name)
        for rename in self._renames:
            short = rename.apply(short)
        return short


@cache
def _table() -> dict[str, list[list[str]]]:
    """Return the renames of each model by the name of its class and its model type, with a space between the two."""
    with open(TABLE, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    return {name: row["renames"] for row in rows for name in row["models"]}


@cache
def _same_type() -> dict[str, str]:
    """Return a name of the table for each model type: models of one type with other heads have the same renames."""
    return {name.partition(" ")[2]: name for name in reversed(_table())}


@cache
def _renames_of(name: str) -> tuple[_Rename, ...]:
    """Return the renames of a model in the table; none for any other name."""
    return tuple(
        _Rename(scope, base, re.compile(pattern), replacement)
        for scope, base, pattern, replacement in _table().get(name, ())
    )
