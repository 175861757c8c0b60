"""PyTorch's files from before torch 1.6: parts of storages, Python 2's strings, and storages that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_pickles import (
    FLOAT,
    FOUR,
    SYSTEM,
    Call,
    Code,
    Persistent,
    Ref,
    check,
    legacy_bytes,
    pickled_as,
    plain,
    tensor,
)

from expo.checkpoints.torch_file import open_torch_file
from expo.errors import CheckpointError


def test_parts_of_storages_as_the_first_versions_had_them(tmp_path: Path) -> None:
    def part(first: int, length: int) -> Persistent:
        return Persistent(("storage", FLOAT, "0", "cpu", 4, ("part", first, length)))

    path = tmp_path / "l.bin"
    path.write_bytes(legacy_bytes(pickled_as({"x": tensor(part(1, 3), 1, (2,))}), {"0": FOUR}))
    check(path, {"x": torch.tensor([3.0, 4])})
    assert torch.load(path, weights_only=False)["x"].tolist() == [3, 4]
    for first, length, size, match in [(1, 4, 1, "ends at 5 of 4"), (1, 2, 3, "end at byte 12 .*, which has 8")]:
        path.write_bytes(legacy_bytes(pickled_as({"x": tensor(part(first, length), 0, (size,))}), {"0": FOUR}))
        with pytest.raises(CheckpointError, match=match):
            open_torch_file(str(path))


def test_what_python_2_wrote(tmp_path: Path) -> None:
    def short(value: str) -> Code:
        return Code(b"U" + bytes([len(value.encode())]) + value.encode())

    stored = Persistent((short("storage"), FLOAT, short("0"), short("cpu"), Code(b"\x8a\x01\x04"), None))
    items = [[short("wé"), tensor(stored)], [short("b"), tensor(stored, 1, (3,))]]
    path = tmp_path / "a.bin"
    path.write_bytes(legacy_bytes(pickled_as(Call(Ref("collections OrderedDict"), (items,))), {"0": FOUR}))
    check(path, {"wé": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([2.0, 3, 4])})


def test_older_files_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def gives(match: str, data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match) as caught:
            open_torch_file(str(path))
        assert str(caught.value).startswith(f"{path}: ")

    good = legacy_bytes(plain(), {"0": FOUR})
    gives(
        "written on a machine with big-endian",
        legacy_bytes(plain(), {"0": FOUR}, system={**SYSTEM, "little_endian": False}),
    )
    gives("written on a machine with big-endian", legacy_bytes(plain(), {"0": FOUR}, system=[]))
    gives(
        "its short, int and long do not have",
        legacy_bytes(plain(), {"0": FOUR}, system={**SYSTEM, "type_sizes": {"short": 4}}),
    )
    gives("its list of storages is not one", legacy_bytes(plain(), {"1": FOUR}))
    gives("its list of storages is not one", legacy_bytes(plain(), {"0": FOUR}, keys=[["0"]]))
    gives("its list of storages is not one", legacy_bytes(plain(), {"0": FOUR}, keys="0"))
    gives("storage '0' occurs twice", legacy_bytes(plain(), {"0": FOUR}, keys=["0", "0"]) + FOUR * 2)
    gives("tensor 'x': it is in storage '0', which is not in the file", legacy_bytes(plain(), {}))
    gives("storage '0' has 4 elements in the pickle, but 2 at", legacy_bytes(plain(), {"0": FOUR}, item=8))
    gives(f"last storage ends at byte {len(good)}, but the file has {len(good) + 1}", good + b"1")
    gives(f"ends at byte {len(good)}, but the file has {len(good) - 1}: truncated", good[:-1])
    gives("its first pickles are not 0x1950a86a20f9469cfc6c and 1001", good.replace(b"M\xe9\x03.", b"M\xea\x03.", 1))
