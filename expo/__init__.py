"""Extrapolate two checkpoints of a language model to a third, without training (ExPO).

    out = aligned + alpha * (aligned - sft)

merge() reads and writes files, stream() reads files and yields tensors, extrapolate() computes arrays and tensors, and
Live sets the alpha of a model in memory. search_alpha() finds the best alpha, and compare() shows the changes of
training. torch.ops.expo.extrapolate is extrapolate() as an operator of torch; it exists after `import expo.op`, or if
torch is imported before expo.
"""

import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .errors import (
    Cancelled,
    CheckpointError,
    EngineError,
    ExpoError,
    OutputError,
    PlanError,
    RankError,
    UsageError,
)

if (
    "torch" in sys.modules
):  # a program that has not imported torch needs no operator, and torch takes a second to import
    from . import op as _op  # noqa: F401

if TYPE_CHECKING:
    from .diff import Comparison, compare
    from .merging.merge import merge
    from .merging.result import Merged, Output
    from .search import SearchResult, search_alpha
    from .tensors.arrays import extrapolate
    from .tensors.live import Live
    from .tensors.streaming import stream

__all__ = [
    "Cancelled",
    "CheckpointError",
    "Comparison",
    "EngineError",
    "ExpoError",
    "Live",
    "Merged",
    "Output",
    "OutputError",
    "PlanError",
    "RankError",
    "SearchResult",
    "UsageError",
    "compare",
    "extrapolate",
    "merge",
    "search_alpha",
    "stream",
]

# The module of each public name, which is imported when a program first uses the name.
_MODULES = {
    "Comparison": "diff",
    "Live": "tensors.live",
    "Merged": "merging.result",
    "Output": "merging.result",
    "SearchResult": "search",
    "compare": "diff",
    "extrapolate": "tensors.arrays",
    "merge": "merging.merge",
    "search_alpha": "search",
    "stream": "tensors.streaming",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name and return the name's value."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # Python finds the name without this function from now on
    return value
