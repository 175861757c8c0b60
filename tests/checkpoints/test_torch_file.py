"""PyTorch's .bin files: every tensor is the one that torch loads, nothing in a file is run, and lies are noticed."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch_pickles import (
    DTYPE_NAMES,
    FLOAT,
    FORMS,
    FOUR,
    STORED,
    Call,
    Persistent,
    Ref,
    check,
    legacy_bytes,
    numbers,
    pickled_as,
    plain,
    read,
    refused,
    save,
    tensor,
    text,
    zip_file,
)

from expo.checkpoints.safetensors_header import element_count
from expo.checkpoints.torch_file import open_torch_file
from expo.dtypes import BITS
from expo.errors import CheckpointError


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict(tmp_path: Path, zipped: bool, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3, bias=False))
    state = model.state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    shard = check(save(state, tmp_path / "a.bin", zipped, protocol), state)
    assert not shard.readers


@FORMS
def test_parameters_and_their_attributes(tmp_path: Path, zipped: bool) -> None:
    bare = torch.nn.Parameter(numbers(3, 4))
    frozen = torch.nn.Parameter(numbers(4), requires_grad=False)
    tagged = torch.nn.Parameter(numbers(2, 2))
    tagged.is_tagged = [1, {2: (3,)}]  # type: ignore[attr-defined]
    tensors = {"bare": bare, "frozen": frozen, "tagged": tagged}
    check(save(tensors, tmp_path / "a.bin", zipped), tensors)


@FORMS
def test_every_dtype(tmp_path: Path, zipped: bool) -> None:
    tensors = {name: (numbers(3, 5).abs() * 9).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    tensors |= {f"{name}.t": tensor.t() for name, tensor in tensors.items()}
    shard = check(save(tensors, tmp_path / "a.bin", zipped), tensors)
    assert set(shard.readers) == {f"{name}.t" for name in DTYPE_NAMES.values()}
    assert set(DTYPE_NAMES.values()) <= set(BITS)


@FORMS
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_a_dtype_that_safetensors_has_not(tmp_path: Path, zipped: bool, dtype: torch.dtype) -> None:
    path = save({"ok": numbers(2), "odd": torch.zeros(3, dtype=torch.complex64).to(dtype)}, tmp_path / "a.bin", zipped)
    with pytest.raises(CheckpointError, match=rf"a\.bin: tensor 'odd': dtype {dtype} is none of bool, uint8"):
        open_torch_file(str(path))


@FORMS
def test_scalars_and_empty_tensors(tmp_path: Path, zipped: bool) -> None:
    tensors = {
        "scalar": torch.tensor(1.5), "of many": numbers(5)[3], "none": torch.zeros(0), "wide": torch.zeros(0, 4),
        "flat": torch.zeros(4, 0, dtype=torch.bfloat16), "of full": numbers(6, 6)[3:3, 2:], "one": numbers(1, 1, 1),
        "": numbers(2), "Ω/\n": numbers(2),
    }  # fmt: skip
    check(save(tensors, tmp_path / "a.bin", zipped), tensors)


@FORMS
def test_tensors_that_share_storages(tmp_path: Path, zipped: bool) -> None:
    base = numbers(64, 8, dtype=torch.bfloat16)
    tensors = {
        "embed": base, "head": base, "rows": base[3:9], "row": base[5], "odd": base.view(-1)[3:],
        "shifted": base.view(-1)[1:].view(7, 73), "one row of many": base[7:8], "columns": base[:, 2:5],
    }  # fmt: skip
    shard = check(save(tensors, tmp_path / "a.bin", zipped), tensors)
    assert set(shard.readers) == {"columns"}
    places = {tensor.name: tensor for tensor in shard.header.tensors}
    assert places["embed"].start == places["head"].start
    assert places["odd"].start == places["embed"].start + 6


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = save({"a": numbers(3, 4).t()}, tmp_path / "a.bin")
    shard = open_torch_file(str(path))
    path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="it is being changed"):
        shard.readers["a"].read(0, bytearray(8))


def test_the_digest_is_of_the_pickle_and_the_places(tmp_path: Path) -> None:
    digests = set()
    half = numbers(4, dtype=torch.float16)
    files = {"a": {"x": numbers(4)}, "b": {"x": numbers(5)}, "c": {"y": numbers(4)}, "d": {"x": half}}
    for name, tensors in files.items():
        save(tensors, tmp_path / f"{name}.bin")
        digests |= {open_torch_file(str(tmp_path / f"{name}.bin")).digest}
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)
    os.rename(tmp_path / "a.bin", tmp_path / "e.bin")
    assert open_torch_file(str(tmp_path / "e.bin")).digest in digests
    moved = zip_file(tmp_path / "f.bin", plain(), {"0": bytes(16)})
    first = open_torch_file(str(moved)).digest
    zip_file(tmp_path / "f.bin", plain(), {"0": bytes(16)}, first={"archive/more": b"12345"})
    assert open_torch_file(str(moved)).digest != first


def fake_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.mark.skipif(not hasattr(torch.serialization, "skip_data"), reason="torch before 2.6")
def test_a_file_of_8_gb_takes_next_to_no_memory(tmp_path: Path) -> None:
    state = fake_state({f"layers.{i}.weight": (16384, 16384) for i in range(16)})
    state["turned"] = state["layers.0.weight"].t()
    path = tmp_path / "a.bin"
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    assert path.stat().st_size > 8 << 30
    import numpy  # noqa: F401  (not measured)

    tracemalloc.start()
    try:
        shard = open_torch_file(str(path))
        opened = tracemalloc.get_traced_memory()[1]
        shard.readers["turned"].read((1 << 28) + 1, bytearray(1 << 18))
        shard.reader.read(path.stat().st_size - 8, bytearray(8))
        shard.reader.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(shard.header.tensors) == 17
    assert opened < 1 << 20
    assert peak < 3 << 20


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    path = save({"a": numbers(3, 4)}, tmp_path / "a.bin")
    code = f"""
import sys
before = set(sys.modules)
import expo.checkpoints.torch_file
assert "torch" not in sys.modules
loaded = "numpy" in sys.modules
shard = expo.checkpoints.torch_file.open_torch_file({str(path)!r})
shard.reader.read(shard.header.tensors[0].start, bytearray(8))
assert "torch" not in sys.modules and ("numpy" in sys.modules) == loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_made_by_hand_are_what_torch_reads(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "z.bin", plain(), {"0": FOUR})
    older = Persistent((*STORED.value, None))
    (tmp_path / "l.bin").write_bytes(legacy_bytes(pickled_as({"x": tensor(older)}), {"0": FOUR}))
    for file in (path, tmp_path / "l.bin"):
        check(file, {"x": torch.tensor([1.0, 2, 3, 4])})
        assert torch.load(file, weights_only=False)["x"].tolist() == [1, 2, 3, 4]


def test_size_as_a_class_of_its_own(tmp_path: Path) -> None:
    size = Call(Ref("torch Size"), ((2, 2),))
    check(
        zip_file(tmp_path / "a.bin", pickled_as({"x": tensor(size=size, stride=(2, 1))}), {"0": FOUR}),
        {"x": torch.tensor([[1.0, 2], [3, 4]])},
    )


def test_more_strided_dimensions_than_numpy_has(tmp_path: Path) -> None:
    stored = Persistent(("storage", FLOAT, "0", "cpu", 40))
    strided = tensor(stored, 0, (2,) * 33, (1, 0) * 16 + (1,))
    refused(tmp_path, pickled_as({"x": strided}), "'x': 33 strided dimensions, but at most 32", {"0": bytes(160)})


def test_names_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    for name in ("\ud800", "__metadata__"):
        refused(tmp_path, pickled_as({name: tensor()}), "has a name that safetensors cannot hold")
    refused(tmp_path, pickled_as({"x": tensor()})[:-1] + text("x") + b"Ns.", "'x' occurs twice in a dict")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file itself; run"),
        (b"\n<!DOCTYPE html><html>", "a web page, not the file itself"),
        (b"\x00" * 257 + b"ustar\x0000", "in the tar format of the first versions of torch"),
        (b"\x02" + bytes(7) + b"{}", "a safetensors file by another name"),
        (b"PK\x03\x04 and no more", "it starts like a zip file of torch.save, but the directory at its end"),
        (pickle.dumps({"x": 1}), "bytes that start with .*, which is nothing that torch.save writes"),
        (b"GGUF" + bytes(40), "44 bytes that start with b'GGUF"),
        (b"\x1f\x8b", "2 bytes that start with"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=what) as caught:
        open_torch_file(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.bin")
    for name, what in [
        ("none.bin", "No such file or directory"),
        ("fifo.bin", "not a regular file"),
        (".", "Is a dir"),
    ]:
        with pytest.raises(CheckpointError, match=what):
            open_torch_file(str(tmp_path / name))


def sample(path: Path, zipped: bool) -> bytes:
    base = numbers(4, 6, dtype=torch.bfloat16)
    state = OrderedDict(a=base, b=base.t(), c=torch.nn.Parameter(numbers(3)), d=torch.arange(5), e=torch.zeros(0, 2))
    state["f"] = torch.ones(4, dtype=torch.uint16)
    return save(state, path, zipped).read_bytes()


def try_it(path: Path, data: bytes) -> bool:
    """Return True if the file opens, after all of its tensors are read."""
    path.write_bytes(data)
    try:
        shard = open_torch_file(str(path))
    except CheckpointError:
        return False
    for name, (dtype, shape, found) in read(shard).items() if shard.size < 1 << 20 else ():
        assert len(found) == element_count(shape) * BITS[dtype] // 8, name
    shard.reader.close()
    return True


@FORMS
def test_truncated_anywhere(tmp_path: Path, zipped: bool) -> None:
    data = sample(tmp_path / "a.bin", zipped)
    lengths = random.Random(1).sample(range(len(data)), 300)
    assert not any(try_it(tmp_path / "b.bin", data[:length]) for length in [*lengths, 1, len(data) - 1])


@FORMS
def test_damaged_anywhere(tmp_path: Path, zipped: bool) -> None:
    data = sample(tmp_path / "a.bin", zipped)
    rng = random.Random(2)
    opened = 0
    for _ in range(800):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 4])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        opened += try_it(tmp_path / "b.bin", bytes(bad))
    assert 0 < opened < 800


@FORMS
def test_damaged_pickles(tmp_path: Path, zipped: bool) -> None:
    """All of the damage is inside the pickle, and pieces of it are moved, removed and repeated."""
    if zipped:
        sample(tmp_path / "a.bin", True)
        with zipfile.ZipFile(tmp_path / "a.bin") as archive:
            names = {name.partition("/data/")[2]: archive.read(name) for name in archive.namelist() if "/data/" in name}
            good = archive.read("a/data.pkl")
    else:
        head = sample(tmp_path / "a.bin", False)
        file = io.BytesIO(head)
        file.seek(137)
        good = head[137 : head.index(b"\x80\x02]")]
    rng = random.Random(3)
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 2])):
            i, j, at = (rng.randrange(len(bad)) for _ in range(3))
            if rng.random() < 0.5:
                bad[at : at + 1] = bytes([rng.randrange(256)])
            else:
                bad[at:at] = bad[i : min(j, i + 40)]
        if zipped:
            zip_file(tmp_path / "c.bin", bytes(bad), names)
            try_it(tmp_path / "b.bin", (tmp_path / "c.bin").read_bytes())
        else:
            try_it(tmp_path / "b.bin", head[:137] + bytes(bad) + head[137 + len(good) :])
