"""PyTorch's zip files: entries that are missing, compressed or damaged are refused, and a directory that lies."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch_pickles import FLOAT, FOUR, Persistent, pickled_as, plain, read, tensor, zip_file

from expo.checkpoints.torch_file import open_torch_file
from expo.errors import CheckpointError


def test_entries_of_a_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def gives(match: str, pickled: bytes = plain(), storages: Mapping[str, bytes] = {"0": FOUR}, **more: Any) -> None:
        zip_file(path, pickled, storages, **more)
        with pytest.raises(CheckpointError, match=match) as caught:
            open_torch_file(str(path))
        assert str(caught.value).startswith(f"{path}: ")

    gives("zip entry 'archive/data.pkl' is compressed or encrypted", compression=zipfile.ZIP_DEFLATED)
    gives("'archive/data.pkl' occurs twice in the zip file", first={"archive/data.pkl": b"."})
    gives(r"a zip file with 2 entries \*/data.pkl", first={"other/data.pkl": b"."})
    gives("a TorchScript program", first={"archive/constants.pkl": b"."})
    gives("its bytes are in the order b'big', but only 'little'", first={"archive/byteorder": b"big"})
    gives("its bytes are in the order b'llllllll", first={"archive/byteorder": b"l" * 100})
    gives("tensor 'x': it is in storage '0', which is not in the file", storages={"1": FOUR})
    gives("tensor 'x': storage '0' has 4 elements of torch.float32, 16 bytes, but 15 ", storages={"0": FOUR[1:]})
    gives("but 17 bytes in the file", storages={"0": FOUR + b"1"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(CheckpointError, match=r"a zip file with 0 entries \*/data.pkl"):
        open_torch_file(str(path))


def test_a_directory_that_lies(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.bin", plain(), {"0": FOUR})
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    first = data.index(b"PK\x01\x02")
    second = data.index(b"archive/data/0", first) - 46

    def gives(match: str, at: int, new: bytes) -> None:
        path.write_bytes(data[:at] + new + data[at + len(new) :])
        with pytest.raises(CheckpointError, match=match):
            open_torch_file(str(path))

    gives("is said to start at byte 1 of", second + 42, struct.pack("<I", 1))
    gives("is said to start at byte 4000000000 of", second + 42, struct.pack("<I", 4_000_000_000))
    gives("zip entry 'archive/data/0' has the name b'archive/data.pkl' at byte 0", second + 42, struct.pack("<I", 0))
    sizes = struct.pack("<II", len(data) + 1, len(data) + 1)
    gives(rf"ends at byte \d+, but the file has {len(data)}: truncated", first + 20, sizes)
    gives("tensor 'x': storage '0' has 4 elements", second + 20, sizes)
    longer = struct.unpack("<I", data[first + 20 : first + 24])[0] + 80
    gives(
        "zip entry 'archive/data/0' starts at byte .* but 'archive/data.pkl' ends",
        first + 20,
        struct.pack("<II", longer, longer),
    )
    gives("its directory at the end|the directory at its end cannot be read", end + 12, struct.pack("<I", 0xFFFFFFF0))
    path.write_bytes(
        data[:first] + bytes(1 << 25) + data[end : end + 12] + struct.pack("<II", 1 << 25, first) + b"\0\0"
    )
    with pytest.raises(CheckpointError, match=r"a directory of 33554432 bytes, but at most 16777216 are read"):
        open_torch_file(str(path))


def test_zip_files_of_over_4_gib(tmp_path: Path) -> None:
    """A sparse file of this size has zip64 entries, as torch and zipfile write them."""
    path, count = tmp_path / "a.bin", (1 << 30) + 6
    stored = Persistent(("storage", FLOAT, "0", "cpu", count))
    pickled = pickled_as({"x": tensor(stored, count - 4), "y": tensor(Persistent(("storage", FLOAT, "1", "cpu", 4)))})
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        info = zipfile.ZipInfo("archive/data/0")
        with archive.open(info, "w", force_zip64=True) as entry:
            entry.write(b"")
        start = file.tell()
        file.seek(start + count * 4 - 16)
        file.write(FOUR)
        info.file_size = info.compress_size = count * 4
        archive.start_dir = file.tell()
        archive.writestr("archive/data/1", FOUR)
    shard = open_torch_file(str(path))
    assert {name: data for name, (_, _, data) in read(shard).items()} == {"x": FOUR, "y": FOUR}
    shard.reader.close()
