"""Format a comparison as lines for a terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .formatting import count_tensors, format_number, format_ranges, shorten_names
from .places import kind_rank
from .records import Comparison, Part, Tensor, pool_relative_norm

MOST_TENSORS = 6  # tensors that the table names
MOST_LAYER_ROWS = 16  # rows for layers in the table; if there are more layers, several share a row
NUMBER_WIDTH = 7  # characters of a formatted number
SHORTEST_NAME = 12  # characters of a tensor's name that the table shows at least
NARROWEST_GRID = 20  # characters of the columns of kinds, however narrow the terminal is
COLUMN = NUMBER_WIDTH + 2  # characters of a column with the space before it


def make_table(comparison: Comparison, width: int) -> Iterator[str]:
    """Yield the lines of the report, about 45 at most, for a terminal of this width."""
    total = comparison.totals
    yield _cut(f"{comparison.sft} -> {comparison.aligned}", width)
    yield "relative norm |aligned - sft| / |aligned|:"
    yield from _layer_rows(comparison, width)
    outside = [f"{part.kind} {format_number(part.relative_norm)}" for part in comparison.layers if part.layer is None]
    if outside:
        yield f"outside of layers: {', '.join(outside)}"
    order = sorted(comparison.tensors, key=_norm_rank, reverse=True)
    changed = [tensor for tensor in order if tensor.changed]
    if changed:
        yield "most changed tensors:"
        yield from _tensor_rows(changed[:MOST_TENSORS], width)
    yield (
        f"in all: {count_tensors(len(comparison.tensors))}, {total.changed_share:.1%} of {total.elements:,} elements "
        f"changed, max |difference| {total.max_abs_difference:.3g}"
    )
    yield (
        f"        relative norm {total.relative_norm:.4g}, cosine {total.cosine:.9g}, "
        f"1-cos {total.one_minus_cosine:.4g}, angle {math.degrees(_angle(total)):.3g} degrees"
    )
    unchanged = sum(not tensor.changed for tensor in comparison.tensors)
    non_finite = total.non_finite_sft + total.non_finite_aligned
    yield (
        f"        {count_tensors(unchanged)} the same in both, {len(comparison.unpaired)} in one alone, "
        f"{len(comparison.not_compared)} not compared, {non_finite} elements not finite"
    )


def _norm_rank(part: Part) -> float:
    """Return the relative norm, with NaN as the largest number."""
    return math.inf if math.isnan(part.relative_norm) else part.relative_norm


def _angle(part: Part) -> float:
    """Return the angle between sft and aligned in radians; small angles are exact, unlike acos of the cosine."""
    half = math.sqrt(part.one_minus_cosine / 2) if not math.isnan(part.one_minus_cosine) else math.nan
    return 2 * math.asin(min(half, 1.0)) if not math.isnan(half) else math.nan


def _tensor_rows(tensors: Sequence[Tensor], width: int) -> Iterator[str]:
    """Yield a line for each tensor; a name that is too long loses its beginning."""
    numbers = [
        f"  {format_number(each.relative_norm):>{NUMBER_WIDTH}}"
        f"  1-cos {format_number(each.one_minus_cosine):>{NUMBER_WIDTH}}  {each.changed_share:6.1%} changed"
        for each in tensors
    ]
    longest = min(max(len(each.name) for each in tensors), width - 2 - max(map(len, numbers)))
    name_width = max(longest, SHORTEST_NAME)
    for tensor, line_end in zip(tensors, numbers, strict=True):
        name = tensor.name if len(tensor.name) <= name_width else f"...{tensor.name[3 - name_width :]}"
        yield f"  {name:{name_width}}{line_end}"


def _layer_rows(comparison: Comparison, width: int) -> Iterator[str]:
    """Yield for each stack its layers by kinds of modules; if there are many layers, a row is for several of them."""
    count = sum(part.layer is not None for part in comparison.layers)
    for stack in dict.fromkeys(part.stack for part in comparison.cells):
        cells = [part for part in comparison.cells if part.stack == stack]
        numbers = sorted({part.layer for part in cells if part.layer is not None})
        layers_per_row = -(-count // MOST_LAYER_ROWS)
        groups = [numbers[i : i + layers_per_row] for i in range(0, len(numbers), layers_per_row)]
        title = "layers" if len(cells) == len(comparison.cells) else stack
        first = max(len(text) for text in (title, *map(format_ranges, groups)))
        columns = _columns(cells, max(width - first, NARROWEST_GRID))
        sizes = [max(len(name), NUMBER_WIDTH) for name, _ in columns]
        names = (f"  {name:>{size}}" for (name, _), size in zip(columns, sizes, strict=True))
        yield f"{title:{first}}" + "".join(names)
        for group in groups:
            parts = [part for part in cells if part.layer in group]
            norms = [pool_relative_norm([part for part in parts if part.kind in kinds]) for _, kinds in columns]
            values = (f"  {format_number(norm):>{size}}" for norm, size in zip(norms, sizes, strict=True))
            yield f"{format_ranges(group):{first}}" + "".join(values)


def _columns(cells: Sequence[Part], width: int) -> list[tuple[str, set[str]]]:
    """Return (title, kinds) of each column that fits into the width; the last column is for all kinds.

    If not all kinds fit, those with the fewest elements share the column "others".
    """
    elements: dict[str, int] = defaultdict(int)
    for part in cells:
        elements[part.kind] += part.elements
    kinds = sorted(elements, key=lambda kind: (kind_rank(kind), kind))
    titles = shorten_names(kinds)
    width -= COLUMN  # the column for all kinds
    own_column = set(kinds)
    while len(own_column) > 1:
        has_others = len(own_column) < len(kinds)
        if sum(max(len(titles[kind]), NUMBER_WIDTH) + 2 for kind in own_column) + COLUMN * has_others <= width:
            break
        own_column.remove(min(own_column, key=lambda kind: (elements[kind], kind)))
    columns = [(titles[kind], {kind}) for kind in kinds if kind in own_column]
    if len(own_column) < len(kinds):
        columns.append(("others", set(kinds) - own_column))
    return [*columns, ("all", set(kinds))]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."
