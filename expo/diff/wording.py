"""How a report writes numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """As much of the end of each kind's name as tells it from the others."""
    found = {}
    for kind in kinds:
        words = kind.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1:
                break
        found[kind] = end
    return found


def number(value: float | None) -> str:
    """Two digits: 1.2e-3; 0 where nothing changed."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "inf" if value == math.inf else "?"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending ones: 0-3, 7, 9-11"""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in found)


def counted(count: int) -> str:
    """1 tensor, 2 tensors"""
    return f"{count} tensor{'s' * (count != 1)}"
