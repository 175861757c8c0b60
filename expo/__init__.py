"""ExPO: a better-aligned language model out of two checkpoints, with no training.

    out = aligned + alpha * (aligned - sft)

merge() goes from file to file, stream() from file into the caller's memory, extrapolate() over arrays and tensors, and
Live sets the alpha of a model that is in memory. search_alpha() finds the best alpha, compare() shows what training
changed.
torch.ops.expo.extrapolate is the last of them as an operator, where torch is imported first; else import expo.op.
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
from .merging.merge import merge
from .merging.result import Merged, Output
from .tensors.arrays import extrapolate
from .tensors.streaming import stream

if "torch" in sys.modules:  # it is never imported for its operator's sake
    from . import op as _op  # noqa: F401

if TYPE_CHECKING:
    from .diff import Comparison, compare
    from .search import SearchResult, search_alpha
    from .tensors.live import Live


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

# What is imported when it is asked for, and its module: with torch or NumPy.
_LAZY = {
    "Comparison": "diff",
    "Live": "tensors.live",
    "SearchResult": "search",
    "compare": "diff",
    "search_alpha": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
