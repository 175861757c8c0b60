"""Fixtures of the tests of the output: a pair, a filesystem of its own, and a check for descriptors left open."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_files import fingerprint, random_tensors, write_folder

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("BF16", (64, 65)), "b": ("F32", (33,)), "c": ("I64", (3,))}


@pytest.fixture(autouse=True)
def closes_what_it_opens(tmp_path: Path) -> Iterator[None]:
    """Check after each test that no descriptor of a file in its folder is open, also where calls have failed."""
    yield
    left = []
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}"):
            left.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert [target for target in left if target.startswith(str(tmp_path))] == []


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folders of sft and aligned, and check afterwards that their files have not changed."""
    made = tuple(
        write_folder(tmp_path / name, random_tensors(SHAPES, seed), 2) for seed, name in enumerate(("sft", "al"))
    )
    before = fingerprint(*made)
    yield made[0], made[1]
    assert fingerprint(*made) == before


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Yield a function that mounts a tmpfs with the given options; skip the test where this process may not mount."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this process may not mount a filesystem: {error}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", str(place)], check=True)
