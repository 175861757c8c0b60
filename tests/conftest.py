"""What holds for all tests: the long ones run only when asked for, and signals are put back."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `exhaustive` tests unless `-m` names the marker."""
    if "exhaustive" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="it takes minutes: ask with -m exhaustive")
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(skip)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """What the process does at a signal, put back: an interrupted command ignores further ones for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it runs in the background
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
