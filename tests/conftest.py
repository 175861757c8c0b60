"""Select the tests that run, and provide the fixtures that tests of several packages share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `exhaustive` tests unless `-m` names the marker."""
    if "exhaustive" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="it takes minutes: ask with -m exhaustive")
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Keep the modules and the collected tests, which live to the end, out of all later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Give this test, and the processes that it starts, Python's default handlers, then restore the former ones.

    A shell ignores SIGINT for programs in the background, nohup ignores SIGHUP, and child processes inherit this.
    A command that was interrupted ignores further signals for good, also when the test ran it in this process.
    """
    before = {number: signal.signal(number, handler) for number, handler in DEFAULT_HANDLERS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def frozen_heap() -> None:
    """Keep the objects that exist already out of all later garbage collections, which are many times faster then."""
    gc.freeze()
