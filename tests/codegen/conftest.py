"""What holds for all tests of compiled kernels: where they run, and where Triton keeps what it compiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

KNOWN = ("3.8.", "3.9.")


def obstacle() -> str:
    """Why they cannot run here, or ""."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter takes the compiler's place"
    try:
        import torch  # noqa: F401
        from triton import __version__ as found
    except ImportError as error:
        return f"no compiler: {error}"
    return "" if found.startswith(KNOWN) else f"what a compiler emits is its version's: known are {KNOWN}, not {found}"


class Skipped(pytest.Module):
    """A module of tests that is not even imported."""

    def collect(self) -> NoReturn:
        pytest.skip(obstacle(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Called for the modules of this folder; None leaves them to pytest."""
    return Skipped.from_parent(parent, path=module_path) if obstacle() else None


@pytest.fixture(autouse=True, scope="session")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew, and leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
