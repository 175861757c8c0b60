"""The paper's twelve pairs: which sft, which aligned, which alpha, and what the scores were before and after.

The data are in recipes.json, beside this file.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from ..errors import UsageError

SOURCE = "Model Extrapolation Expedites Alignment, ACL 2025 (arXiv 2404.16792)"
_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes.json")
_HEADINGS = ("recipe", "alpha", "LC win rate %", "win rate %", "MT-Bench", "aligned", "sft")


class Recipe(NamedTuple):
    """One pair of the paper's.

    sft, aligned: hub ids. alpacaeval: win rates of AlpacaEval 2.0 in percent, (before, after), by "wr" and, controlled
    for length, "lc". mtbench: scores of MT-Bench, (before, after).
    """

    recipe: str
    sft: str
    aligned: str
    alpha: float
    alpacaeval: dict[str, tuple[float, float]]
    mtbench: tuple[float, float]


def recipes() -> tuple[Recipe, ...]:
    """All of them, in the paper's order."""
    with open(_FILE, encoding="utf-8") as file:
        entries = json.load(file)
    return tuple(
        Recipe(
            **{
                **entry,
                "alpacaeval": {kind: tuple(scores) for kind, scores in entry["alpacaeval"].items()},
                "mtbench": tuple(entry["mtbench"]),
            }
        )
        for entry in entries
    )


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises UsageError that names those nearest to it."""
    found = {one.recipe: one for one in recipes()}
    if name not in found:
        raise UsageError(_unknown(name, list(found)))
    return found[name]


def _unknown(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no recipe {name!r}: {hint}python -m expo.fast --list-recipes shows all {len(names)}"


def table() -> str:
    """All recipes as text for a terminal: one line each, in columns, under a line of headings; the source below."""
    rows = [_HEADINGS, *(_row(one) for one in recipes())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*lines, f"Scores before -> after; win rates: AlpacaEval 2.0, LC: length-controlled. Source: {SOURCE}"]
    )


def _row(one: Recipe) -> tuple[str, ...]:
    rates = ["{:4.1f} -> {:4.1f}".format(*one.alpacaeval[kind]) for kind in ("lc", "wr")]
    return (one.recipe, f"{one.alpha:g}", *rates, "{:.2f} -> {:.2f}".format(*one.mtbench), one.aligned, one.sft)


def as_json() -> str:
    """All recipes as a JSON array of objects with Recipe's fields."""
    return json.dumps([one._asdict() for one in recipes()])
