"""Reading an output back: from the device, past the page cache, as --verify and --digest do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import expo
from expo.demo import ALIGNED, SFT
from expo.memory import page_aligned
from expo.output import direct_io as writer
from expo.output.direct_io import read_back


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("start", "length"), [(0, 4096), (0, 12_288), (4096, 8192), (8192, 4096), (12_288, 4096)])
def test_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, start: int, length: int) -> None:
    data = os.urandom(10_001)
    (tmp_path / "file").write_bytes(data)
    if not direct:
        monkeypatch.setattr(writer, "O_DIRECT", 0)
    memory = page_aligned(length)
    assert read_back(str(tmp_path / "file"), start, memory) == len(data[start : start + length])
    assert memory[: len(data[start:])] == data[start : start + length]


def test_verify_reads_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a shard is read through a descriptor that has O_DIRECT."""
    if not writer.O_DIRECT:
        pytest.skip("this system has no O_DIRECT")
    read, direct = os.preadv, []

    def watched(fd: int, buffers: Any, offset: int) -> int:
        if "expo-staging" in os.readlink(f"/proc/self/fd/{fd}"):
            direct.append(bool(writer.fcntl.fcntl(fd, writer.fcntl.F_GETFL) & writer.O_DIRECT))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    assert expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", verify=True).verified
    assert direct
    assert all(direct)
