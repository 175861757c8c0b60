"""Limit the CPU time of work, which other load on the machine does not change as it changes the time on the clock."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Assert that this process and the children that end in the block use at most so many seconds of CPU time."""
    began = cpu_seconds()
    yield
    used = cpu_seconds() - began
    assert used <= seconds, f"{used:.2f} seconds of CPU time"


def cpu_seconds() -> float:
    """Return the CPU seconds, user and system, of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
