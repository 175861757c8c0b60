"""ExPO: a better-aligned language model out of two checkpoints, without training.

    out = aligned + alpha * (aligned - sft)

merge() reads and writes files; stream() reads files and yields tensors; extrapolate() computes arrays and tensors; Live
sets the alpha of a model that is in memory. search_alpha() finds the best alpha, and compare() shows what training
changed. torch.ops.expo.extrapolate is extrapolate() as an operator: torch must be imported first, or expo.op.
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

if "torch" in sys.modules:  # the operator is no reason to import torch
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

# The module of each name that is imported when a program asks for it.
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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value
