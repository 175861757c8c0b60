"""ExPO: a better-aligned language model out of two checkpoints, with no training.

    out = aligned + alpha * (aligned - sft)

merge() goes from file to file, stream() from file into the caller's memory, extrapolate() over arrays and tensors.
"""

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

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ExpoError",
    "Merged",
    "Output",
    "OutputError",
    "PlanError",
    "UsageError",
    "extrapolate",
    "merge",
    "stream",
]
