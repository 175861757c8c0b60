"""A hub on this machine, and a client of it, for each test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client
from hub_server import Hub, serve


@pytest.fixture
def server() -> Iterator[Hub]:
    """Yield a hub without repositories."""
    with serve() as running:
        yield running


@pytest.fixture
def client(server: Hub, tmp_path: Path) -> Client:
    """Return a client of the hub with an empty cache."""
    return Client(server.endpoint, tmp_path / "home")
