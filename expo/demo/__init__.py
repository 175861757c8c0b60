"""A tiny aligned/SFT checkpoint pair that ships with the package, and a demonstration that uses it."""

from pathlib import Path

SFT = Path(__file__).resolve().parent / "sft"
ALIGNED = Path(__file__).resolve().parent / "aligned"
