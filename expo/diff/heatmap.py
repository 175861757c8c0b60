"""Draw a comparison: layers by kinds of modules, with the relative norm as a colour on a log scale.

matplotlib draws the picture. It is not a requirement of the package, so it is imported by name when it is needed. The
state of pyplot is left alone.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import UsageError
from .formatting import format_number, shorten_names
from .places import kind_rank
from .records import Comparison

INSTALL = "a picture needs matplotlib: pip install matplotlib; `out='report.json'` needs nothing"
# Lengths in inches.
CELL_HEIGHT = 0.30
LINE_HEIGHT = 0.30  # a line of text and the space to the next line
WIDEST_CELL, NARROWEST_CELL = 0.62, 0.14  # the width of a cell with few layers and with many layers
HEADER_HEIGHT = 1.05  # above the cells
LETTER_WIDTH = 0.088  # a letter of a label
TITLE_LETTER_WIDTH = 0.125  # a letter of a title of 12 points
NUMBERED_CELL = 0.4  # a cell of at most this width is too narrow for its number
LAYER_LABEL_WIDTH = 0.3
COLOUR_BAR_WIDTH = 0.16
GAP = 0.4  # between the layers and the kinds outside of layers

DECADES = 4  # powers of ten on the colour scale; smaller values have the lowest colour
UNCHANGED, MISSING, NOT_FINITE = "#d9d9d9", "#ffffff", "#d62728"
LABEL = "relative norm  |aligned \N{MINUS SIGN} sft| / |aligned|"


class Panel(NamedTuple):
    """A rectangle of cells: the names of its rows and columns, and its values by (row, column)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]


def draw_heat_map(comparison: Comparison, file_format: str) -> bytes:
    """Return the bytes of a picture in a format: "png", "svg" or "pdf". Raises UsageError without matplotlib."""
    try:
        figures, colors = import_module("matplotlib.figure"), import_module("matplotlib.colors")
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    panels, outside = make_panels(comparison)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib warns of glyphs that a font lacks
        figure = HeatMap(figures.Figure, colors, comparison, panels, outside).draw()
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[file_format]
        figure.savefig(data, format=file_format, dpi=150, metadata=metadata, facecolor="white")
    return data.getvalue()


def make_panels(comparison: Comparison) -> tuple[list[Panel], Panel]:
    """Return a panel for each stack of layers, and a panel for the kinds outside of layers."""
    panels = []
    for stack in dict.fromkeys(part.stack for part in comparison.cells):
        cells = [part for part in comparison.cells if part.stack == stack]
        kinds = sorted({part.kind for part in cells}, key=lambda kind: (kind_rank(kind), kind))
        layers = sorted({part.layer for part in cells if part.layer is not None})
        whole = {part.layer: part for part in comparison.layers if part.stack == stack}
        values = {(kinds.index(p.kind), layers.index(p.layer)): p.relative_norm for p in cells if p.layer is not None}
        values |= {(len(kinds), i): whole[layer].relative_norm for i, layer in enumerate(layers)}
        names = shorten_names(kinds)
        panels.append(Panel(stack, [*(names[kind] for kind in kinds), "whole layer"], [str(n) for n in layers], values))
    outside = [part for part in comparison.layers if part.layer is None]
    values = {(i, 0): part.relative_norm for i, part in enumerate(outside)}
    return panels, Panel("", [part.kind for part in outside], [""], values)


class HeatMap:
    """A figure in which every element has a place in inches, so that nothing overlaps for any number of layers."""

    def __init__(self, figure: Any, colors: Any, comparison: Comparison, panels: list[Panel], outside: Panel) -> None:
        """Compute the colour scale and the sizes.

        Args:
            figure: matplotlib's class Figure.
            colors: matplotlib's module of that name.
            comparison: The comparison, for the titles.
            panels: A panel for each stack of layers.
            outside: The panel of the kinds outside of layers.
        """
        self._comparison, self._panels, self._outside = comparison, panels, outside
        values = [v for panel in (*panels, outside) for v in panel.values.values() if math.isfinite(v) and v > 0]
        high = max(values, default=1.0)
        low = max(min(values, default=0.1), high / 10**DECADES)
        if high < low * 1.5:
            low, high = low / 1.5, high * 1.5
        self._is_clipped = min(values, default=1.0) < low
        self._norm = colors.LogNorm(low, high)
        self._colors = import_module("matplotlib").colormaps["viridis"].with_extremes(bad=MISSING)
        columns = max((len(panel.columns) for panel in panels), default=1)
        self._cell_width = min(max(7.0 / columns, NARROWEST_CELL), WIDEST_CELL)
        self._left = 0.35 + LETTER_WIDTH * max((len(row) for panel in panels for row in panel.rows), default=0)
        self._grid_width = self._cell_width * columns if panels else 0.0
        labels = LETTER_WIDTH * max((len(row) for row in outside.rows), default=0)
        self._width = max(self._left + self._grid_width + GAP + WIDEST_CELL + labels + 0.3 + 1.1, 7.0)
        panel_heights = [CELL_HEIGHT * len(panel.rows) + 3 * LINE_HEIGHT for panel in panels]
        self._height = HEADER_HEIGHT + 0.05 + max(
            sum(panel_heights), 10 * CELL_HEIGHT + LINE_HEIGHT, CELL_HEIGHT * len(outside.rows) + LINE_HEIGHT
        )  # fmt: skip
        self._figure = figure(figsize=(self._width, self._height))

    def draw(self) -> Any:
        """Draw everything and return the figure."""
        self._draw_titles()
        top = HEADER_HEIGHT
        for panel in self._panels:
            height = CELL_HEIGHT * len(panel.rows)
            axes = self._add_axes(self._left, top, self._cell_width * len(panel.columns), height)
            self._draw_cells(axes, panel, self._cell_width)
            self._label_layers(axes, panel)
            top += height + 3 * LINE_HEIGHT
        left = self._left + self._grid_width + (GAP if self._panels else 0.0)
        if self._outside.rows:
            axes = self._add_axes(left, HEADER_HEIGHT, WIDEST_CELL, CELL_HEIGHT * len(self._outside.rows))
            self._draw_cells(axes, self._outside, WIDEST_CELL)
            axes.yaxis.tick_right()
            axes.set_xticks([])
            axes.set_title("outside of layers", fontsize=9.5, loc="left", pad=5)
        self._draw_scale(self._width - 1.25)
        return self._figure

    def _add_axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Return new axes at a place in inches from the upper left corner."""
        bottom = self._height - top - height
        return self._figure.add_axes(
            (left / self._width, bottom / self._height, width / self._width, height / self._height)
        )

    def _draw_titles(self) -> None:
        """Draw the names of both checkpoints, smaller or shortened if they are long, and the totals below them."""
        total = self._comparison.totals
        names = f"{_escape(self._comparison.sft)}  \N{RIGHTWARDS ARROW}  {_escape(self._comparison.aligned)}"
        points = min(max(12 * self._width / (TITLE_LETTER_WIDTH * len(names)), 7.0), 12.0)
        most = int(self._width / TITLE_LETTER_WIDTH * 12 / points)
        names = names if len(names) <= most else f"{names[: most - 3]}..."
        text = (
            f"relative norm {total.relative_norm:.3g}, {total.changed_share:.1%} of {total.elements:,} elements changed"
        )
        x, y = 0.25 / self._width, 1 - 0.32 / self._height
        self._figure.text(x, y, names, fontsize=points, fontweight="bold", va="center")
        self._figure.text(x, y - 0.26 / self._height, text, fontsize=9.5, color="#444444", va="center")

    def _draw_cells(self, axes: Any, panel: Panel, cell_width: float) -> None:
        """Draw the cells of a panel and the names of its rows, with numbers in the cells if they are wide enough."""
        patches = import_module("matplotlib.patches")
        axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0))
        for (row, column), value in panel.values.items():
            color = NOT_FINITE if not math.isfinite(value) else self._colors(self._norm(value)) if value else UNCHANGED
            axes.add_patch(patches.Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
            if cell_width > NUMBERED_CELL:
                is_dark = value > 0 and math.isfinite(value) and self._norm(value) < 0.6
                axes.text(column + 0.5, row + 0.5, format_number(value), ha="center", va="center", fontsize=7,
                          color="white" if is_dark else "#222222")  # fmt: skip
        rows = [_escape(row) for row in panel.rows]
        axes.set_yticks([row + 0.5 for row in range(len(panel.rows))], rows, fontsize=9)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if panel.title:
            axes.axhline(len(panel.rows) - 1, color="white", linewidth=3)

    def _label_layers(self, axes: Any, panel: Panel) -> None:
        """Draw the numbers of the layers, as many as fit."""
        steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        step = next((step for step in steps if self._cell_width * step >= LAYER_LABEL_WIDTH), steps[-1])
        labelled = range(0, len(panel.columns), step)
        axes.set_xticks([i + 0.5 for i in labelled], [panel.columns[i] for i in labelled], fontsize=9)
        axes.set_xlabel(f"layer ({_escape(panel.title)})", fontsize=9.5)

    def _draw_scale(self, left: float) -> None:
        """Draw the colour bar with its unit, and the meaning of grey."""
        height = min(self._height - HEADER_HEIGHT - LINE_HEIGHT, 12 * CELL_HEIGHT)
        axes = self._add_axes(left, HEADER_HEIGHT, COLOUR_BAR_WIDTH, height - LINE_HEIGHT)
        mappable = import_module("matplotlib.cm").ScalarMappable(self._norm, self._colors)
        bar = self._figure.colorbar(mappable, cax=axes, extend="min" if self._is_clipped else "neither")
        ticks = _ticks(self._norm.vmin, self._norm.vmax)
        bar.set_ticks(ticks, labels=[format_number(tick).replace(".0e", "e") for tick in ticks], fontsize=8.5)
        bar.minorticks_off()
        bar.set_label(LABEL, fontsize=9)
        bar.outline.set_visible(False)
        if any(value == 0 for panel in (*self._panels, self._outside) for value in panel.values.values()):
            top = HEADER_HEIGHT + height - LINE_HEIGHT + 0.14
            axes = self._add_axes(left, top, COLOUR_BAR_WIDTH, COLOUR_BAR_WIDTH)
            axes.set(xticks=[], yticks=[], facecolor=UNCHANGED)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.text(1.4, 0.45, "unchanged", transform=axes.transAxes, fontsize=8.5, va="center")


def _ticks(low: float, high: float) -> list[float]:
    """Return about three to eight round numbers in a range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks or [low, high]


def _escape(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
