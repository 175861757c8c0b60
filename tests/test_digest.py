"""--digest and --verify: what stands at --out is what was computed, and stays checkable."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tensors, write_folder

import expo
from expo import writer
from expo.making import Making
from expo.writer import read_back

SHAPES = {"a": ("BF16", (300, 77)), "b": ("F32", (99, 31)), "c": ("I64", (5,))}
Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    sft, aligned = (write_folder(tmp_path / name, random_tensors(SHAPES, i), shards=2) for i, name in enumerate("sa"))
    (aligned / "tokenizer.json").write_text("{}")
    return sft, aligned


def checked(folder: Path, sums: str) -> str:
    """What sha256sum says."""
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", sums], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_a_folder_is_in_it(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "out", digest=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    text = checked(tmp_path / "out", "SHA256SUMS")
    assert {line.split(":")[0] for line in text.splitlines()} == names - {"SHA256SUMS", "model.safetensors.index.json"}


def test_a_file_has_one_beside_it(pair: Pair, tmp_path: Path) -> None:
    files = [next(folder.glob("model-00001*")) for folder in pair]
    expo.merge(*files, 0.3, tmp_path / "out.safetensors", digest=True)
    assert checked(tmp_path, "out.safetensors.sha256") == "out.safetensors: OK\n"
    with pytest.raises(expo.OutputError, match=r"exists"):
        expo.merge(*files, 0.3, tmp_path / "out.safetensors", digest=True)
    (tmp_path / "out.safetensors").unlink()
    with pytest.raises(expo.OutputError, match=r"out\.safetensors\.sha256 exists; .*--overwrite"):
        expo.merge(*files, 0.3, tmp_path / "out.safetensors", digest=True)
    expo.merge(*files, 0.3, tmp_path / "out.safetensors", digest=True, overwrite=True)


def test_no_digests_unless_asked_for(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert not (tmp_path / "out" / "SHA256SUMS").exists()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 10_000), (4096, 10_000), (8192, 4096), (0, 0)])
def test_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, start: int, length: int) -> None:
    data = os.urandom(10_001)
    (tmp_path / "file").write_bytes(data)
    if not direct:
        monkeypatch.setattr(writer, "O_DIRECT", 0)
    assert read_back(str(tmp_path / "file"), start, length) == data[start : start + length]


def test_verify_reads_past_the_page_cache(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a shard is read through a descriptor that has O_DIRECT."""
    if not writer.O_DIRECT:
        pytest.skip("this system has no O_DIRECT")
    read, direct = os.preadv, []

    def watched(fd: int, buffers: Any, offset: int) -> int:
        if "expo-staging" in os.readlink(f"/proc/self/fd/{fd}"):
            direct.append(bool(writer.fcntl.fcntl(fd, writer.fcntl.F_GETFL) & writer.O_DIRECT))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    assert expo.merge(*pair, 0.3, tmp_path / "out", verify=True).verified
    assert direct
    assert all(direct)


def test_verify_names_the_tensor_and_the_byte(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing, as there is nothing in it to go on with."""
    compute = Making.compute

    def spoil(self: Any, *arguments: Any) -> None:
        compute(self, *arguments)
        path = next(iter(self._files[0].values())).path
        with open(path, "r+b") as file:
            file.seek(4096 + 100)
            byte = file.read(1)
            file.seek(4096 + 100)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(Making, "compute", spoil)
    with pytest.raises(expo.OutputError, match=r"byte 4196, byte \d+ of tensor \w, reads back otherwise"):
        expo.merge(*pair, 0.3, tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "s"]
