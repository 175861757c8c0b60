"""A plugin of pytest, `-p on_software_gpu`: the tests of this run find a GPU, the one of `software_cuda`."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

_stack = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    from software_cuda import SoftwareCuda

    devices = int(os.environ.get("SOFTWARE_GPUS", "1"))
    config.software_gpu = _stack.enter_context(SoftwareCuda(devices).active())  # type: ignore[attr-defined]


def pytest_unconfigure() -> None:
    _stack.close()
