"""Show what training changed between two checkpoints: python -m expo.diff, and compare() in Python.

__main__.py       the command line
comparison.py     compare(): from two checkpoints to a Comparison
measurement.py    the pass over both checkpoints
distance.py       its arithmetic, in NumPy
places.py         the layer of a tensor, and the kind of its module
records.py        the result: Comparison, Part, Tensor
pair_warnings.py  its warnings: swapped, unrelated, partly trained, not finite
table.py          the lines for a terminal
report.py         the file: all numbers as JSON, or a picture
heatmap.py        the picture, drawn by matplotlib
formatting.py     numbers and names in the table and in the picture
"""

from typing import TYPE_CHECKING, Any

from .records import Comparison, Part, Tensor

if TYPE_CHECKING:
    from .comparison import compare

__all__ = ["Comparison", "Part", "Tensor", "compare"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # its module imports NumPy, which --help does not need
        from .comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
