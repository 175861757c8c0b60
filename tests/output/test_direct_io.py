"""Writes and reads past the page cache: to the byte, without O_DIRECT, with short writes, and on a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import read_folder
from output_faults import REFUSALS, c_library_whose, no_direct, refuse_at_third_write, refuse_to_sync

import expo
from expo.demo import ALIGNED, SFT
from expo.memory import PAGE, page_aligned
from expo.output import direct_io
from expo.output.direct_io import ShardWriter, create_shard, read_back

Pair = tuple[Path, Path]


def content(size: int) -> bytes:
    """Return random bytes, the same for the same size."""
    return np.random.default_rng(size).bytes(size)


def created(path: Path, size: int) -> ShardWriter:
    """Create a new file of this size, and return a writer of the whole of it."""
    create_shard(str(path), size)
    return ShardWriter(str(path), size, size)


def write_all(path: Path, data: bytes, chunk: int = PAGE, threads: int = 1) -> ShardWriter:
    """Write a new file through a ShardWriter, in chunks and by several threads; return the writer, closed."""
    writer = created(path, len(data))
    starts = iter(range(0, len(data), chunk))
    failures: list[BaseException] = []

    def work() -> None:
        buffer = page_aligned(chunk)
        try:
            for start in starts:
                length = min(chunk, len(data) - start)
                buffer[:length] = data[start : start + length]
                writer.write(start, buffer, length)
        except BaseException as error:
            failures.append(error)

    try:
        if threads == 1:
            work()
        else:
            workers = [threading.Thread(target=work) for _ in range(threads)]
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.join()
    finally:
        writer.close()
    if failures:
        raise failures[0]
    return writer


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 100_001])
@pytest.mark.parametrize("chunk", [4096, 16384])
def test_the_file_is_what_was_written_to_the_byte(tmp_path: Path, size: int, chunk: int) -> None:
    write_all(tmp_path / "file", content(size), chunk)
    assert (tmp_path / "file").read_bytes() == content(size)


def test_the_file_has_its_full_size_before_the_first_write(tmp_path: Path) -> None:
    create_shard(str(tmp_path / "file"), 123_457)
    assert (tmp_path / "file").stat().st_size == 123_457


def test_a_file_that_is_there_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(expo.OutputError, match=f"{tmp_path}/file: File exists"):
        create_shard(str(tmp_path / "file"), 4096)
    assert (tmp_path / "file").read_text() == "mine"


def test_after_a_sync_that_failed_none_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_sync(monkeypatch, 1)
    buffer = page_aligned(2 * PAGE)
    with contextlib.closing(created(tmp_path / "file", 2 * PAGE)) as writer:
        writer.sync()  # succeeds: nothing is written yet, and the file is not open
        writer.write(0, buffer, PAGE)
        for _ in range(2):
            with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
                writer.sync()
        with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
            writer.write(PAGE, buffer, PAGE)
    with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
        writer.sync()


def test_a_file_that_is_whole_already_is_cut_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "file", content(PAGE + 5)
    path.write_bytes(data + b"the rest of the last block")
    refuse_to_sync(monkeypatch, 1)
    with pytest.raises(expo.OutputError, match=f"^{path}: Input/output error$"):
        create_shard(str(path), len(data), len(data))
    create_shard(str(path), len(data), len(data))
    assert path.read_bytes() == data


@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_filesystem_without_o_direct_gets_buffered_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None], threads: int
) -> None:
    data = content(50 * PAGE + 17)
    refuse(monkeypatch)
    writer = write_all(tmp_path / "file", data, threads=threads)
    assert not writer.direct
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("refuse", REFUSALS)
def test_a_merge_without_o_direct_says_so(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    expo.merge(*pair, 0.3, tmp_path / "plain")
    refuse(monkeypatch)
    assert not expo.merge(*pair, 0.3, tmp_path / "out", verify=True).direct or refuse is refuse_at_third_write
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "plain")


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 1000, 1])
@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, direct: bool) -> None:
    real = os.pwrite
    if not direct:
        no_direct(monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:most], offset))
    data = content(4 * PAGE + 5)
    write_all(tmp_path / "file", data, chunk=2 * PAGE)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None])
def test_a_filesystem_that_cannot_allocate_gets_a_file_with_holes(tmp_path: Path, code: int | None) -> None:
    with c_library_whose("fallocate64", code):
        write_all(tmp_path / "file", content(9999))
    assert (tmp_path / "file").read_bytes() == content(9999)


@pytest.mark.parametrize("fallocates", [True, False])
def test_a_disk_that_is_full(mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fallocates: bool) -> None:
    place = mounted("size=256k")
    if not fallocates:
        monkeypatch.setattr(expo.output.direct_io, "allocate", os.ftruncate)
    with pytest.raises(expo.OutputError, match=rf"{place}/file: No space left on device; free some space or choose"):
        write_all(place / "file", content(1 << 20))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("start", "length"), [(0, 4096), (0, 12_288), (4096, 8192), (8192, 4096), (12_288, 4096)])
def test_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, start: int, length: int) -> None:
    data = os.urandom(10_001)
    (tmp_path / "file").write_bytes(data)
    if not direct:
        monkeypatch.setattr(direct_io, "O_DIRECT", 0)
    memory = page_aligned(length)
    assert read_back(str(tmp_path / "file"), start, memory) == len(data[start : start + length])
    assert memory[: len(data[start:])] == data[start : start + length]


def test_verify_reads_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--verify reads every byte of a shard through a descriptor that has O_DIRECT."""
    if not direct_io.O_DIRECT:
        pytest.skip("this system has no O_DIRECT")
    read, direct = os.preadv, []

    def watched(fd: int, buffers: Any, offset: int) -> int:
        if "expo-staging" in os.readlink(f"/proc/self/fd/{fd}"):
            direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & direct_io.O_DIRECT))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    assert expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", verify=True).verified
    assert direct
    assert all(direct)
