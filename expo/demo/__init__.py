"""A tiny pair of checkpoints that comes with the package, and a demonstration that merges it."""

from pathlib import Path

SFT = Path(__file__).resolve().parent / "sft"
ALIGNED = Path(__file__).resolve().parent / "aligned"
