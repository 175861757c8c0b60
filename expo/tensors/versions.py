"""Count writes that torch does not see: a kernel writes to the memory of a tensor at an address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def count_writes(torch: Any, tensors: Sequence[Any]) -> None:
    """Count a write to each tensor, as torch's own operations do, so that autograd refuses stale numbers."""
    increment = torch.autograd.graph.increment_version
    try:
        increment(tensors)
    except TypeError:  # older releases of torch take one tensor alone
        for tensor in tensors:
            increment(tensor)
