"""The fixtures of all tests of the search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from searches import quiet_transformers
from tiny_checkpoints import make_qwen, save_random


@pytest.fixture(autouse=True, scope="module")
def _quiet_transformers() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(autouse=True)
def _frozen_heap(frozen_heap: None) -> None:
    """Freeze the heap before each test: a search collects garbage before it loads a model."""


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders sft and aligned of a mixture, whose experts transformers fuses."""
    folder = tmp_path_factory.mktemp("mixture")
    return save_random(folder / "sft", make_qwen(), 1), save_random(folder / "aligned", make_qwen(), 2)


@pytest.fixture
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the test's own folder the current one, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
