"""What a reader needs to judge a figure: processor, memory, disk, filesystem and versions; no name of a machine."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import expo

PACKAGES = ("numpy", "torch", "safetensors", "transformers")


def describe(cpu: str) -> dict[str, Any]:
    """cpu: the processor's name, as found by pytest-benchmark."""
    scratch = Path(tempfile.gettempdir())
    return {
        "cpu": cpu or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "disk": _disk(scratch),
        "filesystem": _filesystem(scratch),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "expo": expo.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _filesystem(folder: Path) -> str:
    """The type of the filesystem that a folder is on, ext4 say: that of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above)[1]


def _disk(folder: Path) -> str:
    """The block device that a folder is on, as far as the system tells: "vda, virtio, not rotational"."""
    device = folder.stat().st_dev
    found = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not found.exists():
        return "no block device"
    found = found.resolve()
    disk = found.parent if (found / "partition").exists() else found
    words = [disk.name]
    model = disk / "device" / "model"
    driver = disk / "device" / "driver"
    if model.exists():
        words.append(model.read_text().strip())
    elif driver.exists():
        words.append(driver.resolve().name)
    spins = (disk / "queue" / "rotational").read_text().strip() == "1"
    return ", ".join([*words, "rotational" if spins else "not rotational"])
