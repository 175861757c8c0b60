"""These hooks skip the tests of compiled kernels where they cannot run, and give Triton a new cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

KNOWN = ("3.8.", "3.9.")


def obstacle() -> str:
    """Return the reason why the tests cannot run here, or ""."""
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
    """Return a skipped module where the tests cannot run; None lets pytest collect the module as usual."""
    return Skipped.from_parent(parent, path=module_path) if obstacle() else None


@pytest.fixture(autouse=True, scope="session")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make Triton compile every kernel again, once for all workers, and leave nothing in the user's cache."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of all workers of this run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(base / "triton-codegen"))
        yield
