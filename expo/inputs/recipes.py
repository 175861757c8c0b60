"""The paper's twelve pairs of checkpoints, with the alpha and the scores of each, before and after the merge.

recipes.json, beside this file, has the data.
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
    """One pair of checkpoints of the ExPO paper. In its scores, before is aligned's score and after is the merge's.

    Attributes:
        recipe: The name that --recipe takes.
        sft: A hub id.
        aligned: A hub id.
        alpha: The paper's alpha for this pair.
        alpacaeval: Win rates of AlpacaEval 2.0 in percent, as (before, after): "wr" has the plain win rates, "lc" those
            that are controlled for length.
        mtbench: Scores of MT-Bench from 1 to 10, as (before, after).
    """

    recipe: str
    sft: str
    aligned: str
    alpha: float
    alpacaeval: dict[str, tuple[float, float]]
    mtbench: tuple[float, float]


def recipes() -> tuple[Recipe, ...]:
    """Return all recipes, in the paper's order."""
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
    """Return the recipe of this name. Raises UsageError with the most similar names if there is none."""
    found = {one.recipe: one for one in recipes()}
    if name not in found:
        raise UsageError(_unknown_name(name, list(found)))
    return found[name]


def _unknown_name(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no recipe {name!r}: {hint}python -m expo.fast --list-recipes shows all {len(names)}"


def table() -> str:
    """Return a table of all recipes for a terminal: a line of headings, one line for each recipe, and the source."""
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
    """Return all recipes as a JSON array of objects with Recipe's fields."""
    return json.dumps([one._asdict() for one in recipes()])
