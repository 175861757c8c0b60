"""The sizes of checkpoints that are merged, in GB (1e9 bytes) of one, and whether this machine has room for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

SIZES = sorted(float(size) for size in os.environ.get("EXPO_BENCH_GB", "0.5,2,8").split(","))
MIDDLE = SIZES[len(SIZES) // 2]
SLOW_ALSO = [size for size in SIZES if size <= 2]  # the paper's script holds 2.5 models and takes 10 s for each GB
GROWING = [SIZES[-1] * share for share in (0.125, 0.5, 1.25, 2.5, 5)]  # 1 to 40 where the largest pair is of 8
SPARE_DISK = 4.0  # GB that stay free


def size_id(size: float) -> str:
    return f"{size:g}GB"


def need_disk(gigabytes: float) -> None:
    """Skip where the scratch folder has no room."""
    need, free = gigabytes + SPARE_DISK, shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < need:
        pytest.skip(f"needs {need:.1f} GB of disk, and {free:.1f} GB are free")


def need_memory(nbytes: float) -> None:
    """Skip where the page cache has no room."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if available < nbytes:
        pytest.skip(f"a warm cache needs {nbytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available")
