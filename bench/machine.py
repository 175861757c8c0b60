"""Describe the machine that a figure comes from: processor, memory, disk, filesystem and versions, but no name."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expo._version import __version__

PACKAGES = ("numpy", "torch", "safetensors", "transformers")


def describe(cpu: str) -> dict[str, Any]:
    """Return the description, with the processor's name as pytest-benchmark reports it."""
    scratch = Path(tempfile.gettempdir())
    return {
        "cpu": cpu or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "disk": _disk(scratch),
        "filesystem": _filesystem(scratch),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "expo": __version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _filesystem(folder: Path) -> str:
    """Return the type of a folder's filesystem, such as ext4, which is that of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above)[1]


def _disk(folder: Path) -> str:
    """Return the block device of a folder, as far as the system shows it, such as "vda, virtio, not rotational"."""
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not path.exists():
        return "no block device"
    path = path.resolve()
    disk = path.parent if (path / "partition").exists() else path
    words = [disk.name]
    model = disk / "device" / "model"
    driver = disk / "device" / "driver"
    if model.exists():
        words.append(model.read_text().strip())
    elif driver.exists():
        words.append(driver.resolve().name)
    rotational = (disk / "queue" / "rotational").read_text().strip() == "1"
    return ", ".join([*words, "rotational" if rotational else "not rotational"])
