"""What holds for all tests: the long ones run only when asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `exhaustive` tests unless `-m` names the marker."""
    if "exhaustive" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="it takes minutes: ask with -m exhaustive")
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(skip)
