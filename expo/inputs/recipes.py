"""Public pairs of checkpoints: the paper's twelve, others with a published alpha, and others without one.

recipes.json, beside this file, has the data.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from ..errors import UsageError

SOURCES = {
    "paper": "Model Extrapolation Expedites Alignment, ACL 2025 (arXiv 2404.16792)",
    "cards": "model cards of the paper's authors, and the leaderboard of AlpacaEval 2.0",
}
_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes.json")
_HEADINGS = ("recipe", "alpha", "LC win rate %", "win rate %", "MT-Bench", "aligned", "sft")
_LEGEND = "Scores before -> after; win rates: AlpacaEval 2.0, LC: length-controlled."
_NO_ALPHA = "A pair without an alpha has no published one: give --alpha, or find one with python -m expo.search."

Scores = tuple[float, float]


class Recipe(NamedTuple):
    """One public pair of checkpoints. In its scores, before is aligned's score and after is the merge's.

    Attributes:
        recipe: The name that --recipe takes.
        sft: A hub id.
        aligned: A hub id.
        alpha: The published alpha for this pair; None if none was published.
        alpacaeval: Win rates of AlpacaEval 2.0 in percent, as (before, after): "wr" has the plain win rates, "lc" those
            that are controlled for length. None without a published alpha.
        mtbench: Scores of MT-Bench from 1 to 10, as (before, after); None if none were published.
        source: The key in SOURCES of the alpha's and the scores' source; "" without a published alpha.
        note: A doubt about the pair; "" for none.
    """

    recipe: str
    sft: str
    aligned: str
    alpha: float | None
    alpacaeval: dict[str, Scores] | None
    mtbench: Scores | None
    source: str
    note: str


def recipes() -> tuple[Recipe, ...]:
    """Return all recipes: the paper's in the paper's order, then the others."""
    with open(_FILE, encoding="utf-8") as file:
        return tuple(_read(entry) for entry in json.load(file))


def _read(entry: dict[str, Any]) -> Recipe:
    """Return the recipe of one object of recipes.json."""
    rates, mtbench = entry["alpacaeval"], entry["mtbench"]
    return Recipe(
        **{
            **entry,
            "alpacaeval": rates and {kind: tuple(scores) for kind, scores in rates.items()},
            "mtbench": mtbench and tuple(mtbench),
        }
    )


def recipe(name: str) -> Recipe:
    """Return the recipe of this name. Raises UsageError with the most similar names if there is none."""
    found = {one.recipe: one for one in recipes()}
    if name not in found:
        raise UsageError(_unknown_name(name, list(found)))
    return found[name]


def alpha_of(one: Recipe) -> float:
    """Return the published alpha of a recipe. Raises UsageError if there is none."""
    if one.alpha is None:
        raise UsageError(
            f"no alpha was published for the recipe {one.recipe}: give `alpha`, or find the best one for your prompts "
            f"with python -m expo.search --recipe {one.recipe}"
        )
    return one.alpha


def _unknown_name(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no recipe {name!r}: {hint}python -m expo.fast --list-recipes shows all {len(names)}"


def table() -> str:
    """Return a table of all recipes for a terminal: a line of headings, one line for each recipe, and the sources."""
    found = recipes()
    rows = [_HEADINGS, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = dict.fromkeys(f"* {one.note}" for one in found if one.note)
    sources = []
    for key, source in SOURCES.items():
        names = [one.recipe for one in found if one.source == key]
        sources.append(f"Source from {names[0]} to {names[-1]}: {source}")
    return "\n".join([*lines, "", _LEGEND, *sources, _NO_ALPHA, *notes])


def _row(one: Recipe) -> tuple[str, ...]:
    """Return the cells of one recipe's line; a dash stands for a number that was not published."""
    alpha = "-" if one.alpha is None else f"{one.alpha:g}"
    rates = ["{:4.1f} -> {:4.1f}".format(*one.alpacaeval[kind]) if one.alpacaeval else "-" for kind in ("lc", "wr")]
    mtbench = "{:.2f} -> {:.2f}".format(*one.mtbench) if one.mtbench else "-"
    return (one.recipe, alpha, *rates, mtbench, one.aligned + "*" * bool(one.note), one.sft)


def as_json() -> str:
    """Return all recipes as a JSON array of objects with Recipe's fields."""
    return json.dumps([one._asdict() for one in recipes()])
