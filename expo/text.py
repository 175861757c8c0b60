"""Write numbers as text for a user."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Return a number of bytes as text, in powers of 1000, such as `4.40 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def alpha_text(alpha: float) -> str:
    """Return the shortest text that a program reads as this alpha, such as `0.3`, `1` or `1e-05`."""
    return f"{alpha:g}" if float(f"{alpha:g}") == alpha else repr(alpha)
