"""A comparison as a picture: layers by kinds of modules, the relative norm as colour on a log scale; by matplotlib.

matplotlib is imported by name when a picture is asked for: it is no requirement. No state of pyplot's is touched.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import UsageError
from .places import kind_order
from .records import Comparison
from .wording import number, short_names

INSTALL = "a picture needs matplotlib: pip install matplotlib; --out report.json needs nothing"
CELL, LINE = 0.30, 0.30  # inches: a cell's height, and what a line of text with its distance takes
WIDEST, NARROWEST = 0.62, 0.14  # a cell's width, with few layers and with many
TOP = 1.05  # inches above the cells
LETTER = 0.088  # of a label's width
DECADES = 4  # that colours tell apart; what is below is the lowest
LETTERED = 0.4  # inches: a narrower cell has no room for its number
UNCHANGED, MISSING = "#d9d9d9", "#ffffff"
LABEL = "relative norm  |aligned \N{MINUS SIGN} sft| / |aligned|"


class Panel(NamedTuple):
    """A rectangle of cells: names of rows and columns, values by (row, column)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]


def heat_map(found: Comparison, form: str) -> bytes:
    """A file's bytes; form: "png", "svg" or "pdf". Raises UsageError."""
    try:
        figures, colors = import_module("matplotlib.figure"), import_module("matplotlib.colors")
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    panels, outside = _panels(found)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that a font lacks
        figure = _Sheet(figures.Figure, colors, found, panels, outside).draw()
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
        figure.savefig(data, format=form, dpi=150, metadata=metadata, facecolor="white")
    return data.getvalue()


def _panels(found: Comparison) -> tuple[list[Panel], Panel]:
    """One for each stack of layers, and what is outside of them."""
    panels = []
    for stack in dict.fromkeys(part.stack for part in found.cells):
        cells = [part for part in found.cells if part.stack == stack]
        kinds = sorted({part.kind for part in cells}, key=lambda kind: (kind_order(kind), kind))
        layers = sorted({part.layer for part in cells if part.layer is not None})
        whole = {part.layer: part for part in found.layers if part.stack == stack}
        values = {(kinds.index(p.kind), layers.index(p.layer)): p.relative_norm for p in cells if p.layer is not None}
        values |= {(len(kinds), i): whole[layer].relative_norm for i, layer in enumerate(layers)}
        names = short_names(kinds)
        panels.append(Panel(stack, [*(names[kind] for kind in kinds), "whole layer"], [str(n) for n in layers], values))
    apart = [part for part in found.layers if part.layer is None]
    return panels, Panel("", [p.kind for p in apart], [""], {(i, 0): p.relative_norm for i, p in enumerate(apart)})


class _Sheet:
    """Places everything in inches, so that nothing overlaps whatever the number of layers and kinds."""

    def __init__(self, figure: Any, colors: Any, found: Comparison, panels: list[Panel], outside: Panel) -> None:
        self._found, self._panels, self._outside = found, panels, outside
        values = [v for panel in (*panels, outside) for v in panel.values.values() if math.isfinite(v) and v > 0]
        high = max(values, default=1.0)
        low = max(min(values, default=0.1), high / 10**DECADES)
        if high < low * 1.5:
            low, high = low / 1.5, high * 1.5
        self._clipped = min(values, default=1.0) < low
        self._norm = colors.LogNorm(low, high)
        self._colors = import_module("matplotlib").colormaps["viridis"].with_extremes(bad=MISSING)
        many = max((len(panel.columns) for panel in panels), default=1)
        self._width = min(max(7.0 / many, NARROWEST), WIDEST)
        self._left = 0.35 + LETTER * max((len(row) for panel in panels for row in panel.rows), default=0)
        self._right = LETTER * max((len(row) for row in outside.rows), default=0)
        grid = self._width * many if panels else 0.0
        self._wide = max(self._left + grid + 0.4 + WIDEST + self._right + 0.3 + 1.1, 7.0)
        tall = [CELL * len(panel.rows) + 3 * LINE for panel in panels]
        self._tall = TOP + 0.05 + max(sum(tall), 10 * CELL + LINE, CELL * len(outside.rows) + LINE)
        self._grid = grid
        self._figure = figure(figsize=(self._wide, self._tall))

    def draw(self) -> Any:
        top = TOP  # inches from the upper edge
        self._titles()
        for panel in self._panels:
            axes = self._axes(self._left, top, self._width * len(panel.columns), CELL * len(panel.rows))
            self._cells(axes, panel, self._width)
            self._numbers(axes, panel)
            top += CELL * len(panel.rows) + 3 * LINE
        at = self._left + self._grid + (0.4 if self._panels else 0.0)
        if self._outside.rows:
            axes = self._axes(at, TOP, WIDEST, CELL * len(self._outside.rows))
            self._cells(axes, self._outside, WIDEST)
            axes.yaxis.tick_right()
            axes.set_xticks([])
            axes.set_title("outside of layers", fontsize=9.5, loc="left", pad=5)
        self._scale(self._wide - 1.25)
        return self._figure

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        wide, tall = self._wide, self._tall
        return self._figure.add_axes((left / wide, 1 - (top + height) / tall, width / wide, height / tall))

    def _titles(self) -> None:
        total = self._found.totals
        names = f"{_plain(self._found.sft)}  \N{RIGHTWARDS ARROW}  {_plain(self._found.aligned)}"
        points = min(max(12 * self._wide / (0.125 * len(names)), 7.0), 12.0)
        most = int(self._wide / 0.125 * 12 / points)
        names = names if len(names) <= most else f"{names[: most - 3]}..."
        text = (
            f"relative norm {total.relative_norm:.3g}, {total.changed_share:.1%} of {total.elements:,} elements changed"
        )
        y = 1 - 0.32 / self._tall
        self._figure.text(0.25 / self._wide, y, names, fontsize=points, fontweight="bold", va="center")
        self._figure.text(0.25 / self._wide, y - 0.26 / self._tall, text, fontsize=9.5, color="#444444", va="center")

    def _cells(self, axes: Any, panel: Panel, width: float) -> None:
        patches = import_module("matplotlib.patches")
        axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0))
        for (row, column), value in panel.values.items():
            color = UNCHANGED if value == 0 else self._colors(self._norm(value)) if math.isfinite(value) else "#d62728"
            axes.add_patch(patches.Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
            if width > LETTERED:
                dark = value > 0 and math.isfinite(value) and self._norm(value) < 0.6
                label = number(value)
                axes.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=7,
                          color="white" if dark else "#222222")  # fmt: skip
        axes.set_yticks([row + 0.5 for row in range(len(panel.rows))], [_plain(row) for row in panel.rows], fontsize=9)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if panel.title:
            axes.axhline(len(panel.rows) - 1, color="white", linewidth=3)

    def _numbers(self, axes: Any, panel: Panel) -> None:
        """The layers' numbers, as many as there is room for."""
        each = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if self._width * n >= 0.3 or n == 1000)
        shown = range(0, len(panel.columns), each)
        axes.set_xticks([i + 0.5 for i in shown], [panel.columns[i] for i in shown], fontsize=9)
        axes.set_xlabel(f"layer ({_plain(panel.title)})", fontsize=9.5)

    def _scale(self, left: float) -> None:
        """The colour bar, with the unit, and what grey means."""
        tall = min(self._tall - TOP - LINE, 12 * CELL)
        axes = self._axes(left, TOP, 0.16, tall - LINE)
        mappable = import_module("matplotlib.cm").ScalarMappable(self._norm, self._colors)
        bar = self._figure.colorbar(mappable, cax=axes, extend="min" if self._clipped else "neither")
        ticks = _ticks(self._norm.vmin, self._norm.vmax)
        bar.set_ticks(ticks, labels=[_number(tick) for tick in ticks], fontsize=8.5)
        bar.minorticks_off()
        bar.set_label(LABEL, fontsize=9)
        bar.outline.set_visible(False)
        if any(value == 0 for panel in (*self._panels, self._outside) for value in panel.values.values()):
            axes = self._axes(left, TOP + tall - LINE + 0.14, 0.16, 0.16)
            axes.set(xticks=[], yticks=[], facecolor=UNCHANGED)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.text(1.4, 0.45, "unchanged", transform=axes.transAxes, fontsize=8.5, va="center")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in the range, some three to eight of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 3:
            break
    return found or [low, high]


def _number(value: float) -> str:
    return number(value).replace(".0e", "e")


def _plain(text: str) -> str:
    """Without what matplotlib takes for a formula."""
    return text.replace("$", r"\$")
