"""The sizes of the benchmarks' checkpoints, and checks that this machine has the disk and the memory for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Sizes of one checkpoint in GB (1e9 bytes).
SIZES = sorted(float(size) for size in os.environ.get("EXPO_BENCH_GB", "0.5,2,8").split(","))
MIDDLE_SIZE = SIZES[len(SIZES) // 2]
SLOW_RIVAL_SIZES = [size for size in SIZES if size <= 2]  # the paper's script takes 10 s and the memory of 2.5 models
MEMORY_SIZES = [SIZES[-1] * share for share in (0.125, 0.5, 1.25, 2.5, 5)]  # 1 to 40 GB if the largest pair has 8 GB
SPARE_DISK = 4.0  # GB that stay free


def size_id(size: float) -> str:
    """Return the name of a size in the name of a test."""
    return f"{size:g}GB"


def need_disk(gigabytes: float) -> None:
    """Skip the test if the disk of the temporary folder has too little free space."""
    needed, free = gigabytes + SPARE_DISK, shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < needed:
        pytest.skip(f"needs {needed:.1f} GB of disk, and {free:.1f} GB are free")


def need_memory(nbytes: float) -> None:
    """Skip the test if the page cache cannot take this many bytes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if available < nbytes:
        pytest.skip(f"a warm cache needs {nbytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available")
