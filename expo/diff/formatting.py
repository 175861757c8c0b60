"""Format numbers and names for the table and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shorten_names(kinds: Sequence[str]) -> dict[str, str]:
    """Return for each kind the shortest end of its name that no other kind's name has."""
    short = {}
    for kind in kinds:
        words = kind.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1:
                break
        short[kind] = end
    return short


def format_number(value: float | None) -> str:
    """Return a number with two digits, such as 1.2e-3; 0 as "0", NaN as "?" and None as ""."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "inf" if value == math.inf else "?"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def format_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: 0-3, 7, 9-11."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in ranges)


def count_tensors(count: int) -> str:
    """Return a number of tensors in words: 1 tensor, 2 tensors."""
    return f"{count} tensor{'s' * (count != 1)}"
