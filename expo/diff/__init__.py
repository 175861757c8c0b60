"""What training changed between two checkpoints: python -m expo.diff, and compare() in Python.

__main__.py   the command line
comparing.py  compare(): from two checkpoints to a Comparison
measuring.py    a merge's pass over both that measures, by
distance.py       the arithmetic, in NumPy
places.py       which layer and which kind of module a tensor is, by its name
records.py      the result: Comparison, Part, Tensor
suspicions.py   its warnings: swapped, unrelated, partly trained, not finite
table.py      the lines for a terminal
report.py     the file: all numbers as JSON, or
heatmap.py      the picture, by matplotlib
wording.py      numbers and names in both
"""

from typing import TYPE_CHECKING, Any

from .records import Comparison, Part, Tensor

if TYPE_CHECKING:
    from .comparing import compare

__all__ = ["Comparison", "Part", "Tensor", "compare"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # with NumPy
        from .comparing import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
