"""A comparison as lines for a terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .places import kind_order
from .records import Comparison, Part, Tensor, pooled
from .wording import counted, number, ranges, short_names

TOP = 6  # tensors named in the table
BANDS = 16  # rows of layers in the table


def table(found: Comparison, width: int) -> Iterator[str]:
    """The lines of a report for a terminal of this width: some 45 at most."""
    total = found.totals
    yield _cut(f"{found.sft} -> {found.aligned}", width)
    yield "relative norm |aligned - sft| / |aligned|:"
    yield from _grid(found, width)
    outside = [f"{part.kind} {number(part.relative_norm)}" for part in found.layers if part.layer is None]
    if outside:
        yield f"outside of layers: {', '.join(outside)}"
    order = sorted(found.tensors, key=_rank, reverse=True)
    top = [each for each in order if each.changed]
    if top:
        yield "most changed tensors:"
        yield from _tops(top[:TOP], width)
    yield (
        f"in all: {counted(len(found.tensors))}, {total.changed_share:.1%} of {total.elements:,} elements changed, "
        f"max |difference| {total.max_abs_difference:.3g}"
    )
    yield (
        f"        relative norm {total.relative_norm:.4g}, cosine {total.cosine:.9g}, "
        f"1-cos {total.one_minus_cosine:.4g}, angle {math.degrees(_angle(total)):.3g} degrees"
    )
    still = sum(not each.changed for each in found.tensors)
    bad = total.non_finite_sft + total.non_finite_aligned
    yield (
        f"        {counted(still)} the same in both, {len(found.unpaired)} in one alone, {len(found.not_compared)} "
        f"not compared, {bad} elements not finite"
    )


def _rank(part: Part) -> float:
    return math.inf if math.isnan(part.relative_norm) else part.relative_norm


def _angle(part: Part) -> float:
    """In radians: exact for small ones, where acos is not."""
    half = math.sqrt(part.one_minus_cosine / 2) if not math.isnan(part.one_minus_cosine) else math.nan
    return 2 * math.asin(min(half, 1.0)) if not math.isnan(half) else math.nan


def _tops(parts: Sequence[Tensor], width: int) -> Iterator[str]:
    tails = [
        f"  {number(p.relative_norm):>7}  1-cos {number(p.one_minus_cosine):>7}  {p.changed_share:6.1%} changed"
        for p in parts
    ]
    room = max(min(max(len(p.name) for p in parts), width - 2 - max(map(len, tails))), 12)
    for part, tail in zip(parts, tails, strict=True):
        name = part.name if len(part.name) <= room else f"...{part.name[3 - room :]}"
        yield f"  {name:{room}}{tail}"


def _grid(found: Comparison, width: int) -> Iterator[str]:
    """For each stack its layers, or bands of them, by kinds of modules; the largest where there is no room for all."""
    count = sum(part.layer is not None for part in found.layers)
    for stack in dict.fromkeys(part.stack for part in found.cells):
        cells = [part for part in found.cells if part.stack == stack]
        numbers = sorted({part.layer for part in cells if part.layer is not None})
        each = -(-count // BANDS)
        bands = [numbers[i : i + each] for i in range(0, len(numbers), each)]
        title = "layers" if len(cells) == len(found.cells) else stack
        first = max(len(text) for text in (title, *map(ranges, bands)))
        columns = _columns(cells, max(width - first, 20))
        sizes = [max(len(name), 7) for name, _ in columns]
        yield f"{title:{first}}" + "".join(f"  {name:>{n}}" for (name, _), n in zip(columns, sizes, strict=True))
        for band in bands:
            here = [part for part in cells if part.layer in band]
            values = [number(pooled([part for part in here if part.kind in kinds])) for _, kinds in columns]
            yield f"{ranges(band):{first}}" + "".join(f"  {v:>{n}}" for v, n in zip(values, sizes, strict=True))


def _columns(cells: Sequence[Part], room: int) -> list[tuple[str, set[str]]]:
    """(title, kinds) of each column; the last is all of them."""
    elements: dict[str, int] = defaultdict(int)
    for part in cells:
        elements[part.kind] += part.elements
    kinds = sorted(elements, key=lambda kind: (kind_order(kind), kind))
    titles = short_names(kinds)
    room -= 9
    kept = set(kinds)
    while len(kept) > 1:
        rest = len(kept) < len(kinds)
        if sum(max(len(titles[kind]), 7) + 2 for kind in kept) + 9 * rest <= room:
            break
        kept.remove(min(kept, key=lambda kind: (elements[kind], kind)))
    columns = [(titles[kind], {kind}) for kind in kinds if kind in kept]
    if len(kept) < len(kinds):
        columns.append(("others", set(kinds) - kept))
    return [*columns, ("all", set(kinds))]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."
