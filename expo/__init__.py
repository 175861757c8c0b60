"""ExPO: a better-aligned language model out of two checkpoints, with no training.

    out = aligned + alpha * (aligned - sft)

merge() goes from file to file, stream() from file into the caller's memory, extrapolate() over arrays and tensors, and
Live sets the alpha of a model that is in memory.
torch.ops.expo.extrapolate is the last of them as an operator, where torch is imported first; else import expo.op.
"""

import sys
from typing import TYPE_CHECKING, Any

from .arrays import extrapolate
from .errors import (
    Cancelled,
    CheckpointError,
    EngineError,
    ExpoError,
    OutputError,
    PlanError,
    UsageError,
)
from .pipeline import merge
from .result import Merged, Output
from .streaming import stream

if "torch" in sys.modules:  # it is never imported for its operator's sake
    from . import op as _op  # noqa: F401

if TYPE_CHECKING:
    from .live import Live

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ExpoError",
    "Live",
    "Merged",
    "Output",
    "OutputError",
    "PlanError",
    "UsageError",
    "extrapolate",
    "merge",
    "stream",
]

_LAZY = {"Live": "live"}  # what imports torch, and its module


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
