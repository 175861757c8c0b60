"""The weights that a model class of transformers ties: names that mean one tensor.

A file may have a tied tensor under any of its names, and a state dict has it under all of them. The table
tied_weights.json is generated from transformers' model classes; see tests/architectures/tied_classes.py. A config says
in `architectures` which class its model has, and in `tie_word_embeddings` if the ties apply.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from .naming import unwrap

TABLE = os.path.join(os.path.dirname(__file__), "tied_weights.json")
MOST_STEPS = 3  # a weight may be tied to one that is tied itself
_LITERAL = re.compile(r"[\w.-]*")


class _Rule(NamedTuple):
    """A tie as one class declares it.

    Attributes:
        pattern: An expression for the names of the tied weights.
        old: The beginning of these names that is replaced; None for all that the expression matches.
        new: The beginning of the name that the weight is tied to.
    """

    pattern: re.Pattern[str]
    old: str | None
    new: str

    def apply(self, name: str) -> str | None:
        """Return the name that a weight is tied to; None if the rule says nothing about the weight."""
        match = self.pattern.match(name)
        return match and self.new + name[match.end() if self.old is None else len(self.old) :]


class TiedNames:
    """The names that mean one tensor in a model of one of the given configs."""

    def __init__(self, configs: Iterable[Mapping[str, Any]]) -> None:
        self._rules = [rule for config in configs for rule in _rules_of(config)]

    def source(self, name: str) -> str:
        """Return the name of the tensor that a weight is tied to, without a wrapper's prefixes.

        A weight that is not tied, or that others are tied to, keeps its name.
        """
        short = unwrap(name)
        for _ in range(MOST_STEPS):
            found = next(filter(None, (rule.apply(short) for rule in self._rules)), short)
            if found == short:
                break
            short = found
        return short

    def find(self, names: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
        """Return, for each name that is tied to just one of the other names, that other name.

        If a name is tied to several of the others, the one counts that all of these are tied to.

        Args:
            names: The name in memory of each tensor, by its name.
            others: The same for the tensors of another model.
        """
        index: dict[str, list[str]] = {}
        for other, in_memory in others.items() if self._rules else ():
            index.setdefault(self.source(in_memory), []).append(other)
        found: dict[str, str] = {}
        for name, in_memory in names.items() if index else ():
            source = self.source(in_memory)
            twins = [other for other in index.get(source, ()) if unwrap(others[other]) != unwrap(in_memory)]
            chosen = [other for other in twins if unwrap(others[other]) == source] or twins
            if len(chosen) == 1:
                found[name] = chosen[0]
        return found


@cache
def _table() -> dict[str, Mapping[str, str]]:
    """Return the ties of each class by its name."""
    with open(TABLE, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    return {name: row["ties"] for row in rows for name in row["classes"]}


def _rules_of(config: Mapping[str, Any]) -> list[_Rule]:
    """Return the rules of the class that a config names; none for a class that is not in the table.

    A model that was put together of an encoder and a decoder has the ties of its decoder.
    """
    named, decoder = config.get("architectures"), config.get("decoder")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    ties = next((_table()[name] for name in names if name in _table()), {})
    is_pair = any(name.endswith("EncoderDecoderModel") for name in names)
    if is_pair and isinstance(decoder, Mapping) and decoder.get("tie_word_embeddings") is not False:
        inner = _table().get(f"decoder {decoder.get('model_type')}", {})
        ties = {f"decoder.{target}": f"decoder.{source}" for target, source in inner.items()}
    rules = (_make_rule(target, source.strip("^$")) for target, source in ties.items())
    return [*(rule for rule in rules if rule is not None), *_shared_layers(config)]


def _shared_layers(config: Mapping[str, Any]) -> list[_Rule]:
    """Return the rule of Zamba, whose hybrid layers share the transformer of the first one; [] for other models.

    Its class makes the tie for each model, so the table does not have it.
    """
    kinds = config.get("layers_block_type")
    if config.get("model_type") != "zamba" or not isinstance(kinds, list) or "hybrid" not in kinds:
        return []
    pattern = re.compile(r"(model\.)?layers\.\d+\.shared_transf\.")
    return [_Rule(pattern, None, f"model.layers.{kinds.index('hybrid')}.shared_transf.")]


def _make_rule(target: str, source: str) -> _Rule | None:
    """Return the rule of one entry; None if the name that the weight is tied to does not follow from the entry.

    Both sides are expressions. They often differ only in their beginnings, which are replaced then.
    """
    is_name = _LITERAL.fullmatch(target) and target.endswith(("weight", "bias"))
    pattern = re.compile(f"{target}$" if is_name else target)
    ends = zip(reversed(target), reversed(source), strict=False)
    shared = next((i for i, (one, other) in enumerate(ends) if one != other), min(len(target), len(source)))
    old, new = target[: len(target) - shared], source[: len(source) - shared]
    if _LITERAL.fullmatch(old) and _LITERAL.fullmatch(new):
        return _Rule(pattern, old, new)
    return _Rule(pattern, None, source) if _LITERAL.fullmatch(source) else None
