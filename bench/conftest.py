"""Make the fixtures of the benchmarks, which are pairs of checkpoints, one size at a time, and describe the machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.machine import describe
from bench.pairs import llama_shapes, nbytes, scaled_llama, write_pair
from bench.sizes import SIZES, need_disk, size_id

PAIR_SHARDS = 5
SHARDS_70B = 15


@pytest.fixture(scope="session", params=SIZES, ids=size_id)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder with sft/ and aligned/ of random bf16; each size is deleted before the next one is written."""
    need_disk(3 * request.param)
    folder = tmp_path_factory.mktemp("pair")
    yield write_pair(folder, scaled_llama(request.param * 1e9 / 2), PAIR_SHARDS)
    shutil.rmtree(folder)


@pytest.fixture
def sparse_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield the same as sparse files, which take no disk; they are deleted after the test, with its output."""
    shapes = scaled_llama(request.param * 1e9 / 2)
    need_disk(nbytes(shapes) / 1e9)
    yield write_pair(tmp_path / "pair", shapes, PAIR_SHARDS, sparse=True)
    shutil.rmtree(tmp_path / "pair")


@pytest.fixture(scope="session")
def pair_70b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a pair with the names and shapes of Llama-2-70B, in sparse shards: headers without data."""
    folder = tmp_path_factory.mktemp("pair70b")
    yield write_pair(folder, llama_shapes(8192, 28672, 32000, 80, keys=1024), SHARDS_70B, sparse=True)
    shutil.rmtree(folder)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace the machine's description by one without the machine's name."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", "")
    machine_info.clear()
    machine_info.update(describe(cpu))
