"""Tensors whose elements do not lie in the file one after another: every piece is the one that NumPy and torch have."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_pickles import FLOAT, FORMS, Persistent, check, numbers, pickled_as, raw, save, tensor, zip_file

from expo.checkpoints import strided_reader
from expo.checkpoints.strided_reader import StridedReader
from expo.checkpoints.torch_file import open_torch_file


@FORMS
def test_tensors_that_do_not_lie_in_one_piece(tmp_path: Path, zipped: bool) -> None:
    base = numbers(6, 10, 14, dtype=torch.float16)
    tensors = {
        "transposed": base.transpose(0, 2), "permuted": base.permute(1, 2, 0), "sliced": base[1:5:2, ::3, 2:9],
        "every third": base.view(-1)[1::3], "row": numbers(4).expand(3, 4), "column": numbers(4, 1).expand(4, 3),
        "constant": torch.tensor(2.5, dtype=torch.float64).expand(3, 1, 5), "inner": base[:, :, :1].expand(6, 10, 3),
        "windows": numbers(20).unfold(0, 5, 2), "diagonal": numbers(7, 7, dtype=torch.bfloat16).diagonal(),
        "one each": base[:, 4:5, 3:4], "bytes": torch.arange(60, dtype=torch.uint8).view(5, 12).t(),
        "channels": numbers(2, 3, 4, 5).to(memory_format=torch.channels_last), "wild": base.as_strided((3, 4), (1, 2)),
    }  # fmt: skip
    path = save(tensors, tmp_path / "a.bin", zipped)
    shard = check(path, tensors)
    assert set(shard.readers) == set(tensors)
    for name, strided in tensors.items():
        source, wanted = shard.readers[name], raw(strided)
        rng = random.Random(name)
        for _ in range(100):
            start, stop = sorted(rng.choices(range(len(wanted) + 1), k=2))
            found = bytearray(stop - start)
            source.read(start, found)
            assert found == wanted[start:stop], (name, start, stop)
    shard.reader.close()


@pytest.mark.parametrize(("scratch", "gap"), [(16, 0), (64, 1 << 20), (64, 8), (1, 1)])
def test_whatever_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: int, gap: int) -> None:
    base = numbers(5, 6, 7, 4)
    tensors = {
        "a": base.permute(3, 1, 0, 2),
        "b": base[::2, 1::2].permute(2, 3, 0, 1),
        "c": base[:, :1].expand(5, 6, 7, 4),
    }
    path = save(tensors, tmp_path / "a.bin")
    monkeypatch.setattr(strided_reader, "SCRATCH", scratch)
    monkeypatch.setattr(strided_reader, "GAP", gap)
    check(path, tensors)


def test_many_threads(tmp_path: Path) -> None:
    strided = numbers(300, 200).t()
    shard = open_torch_file(str(save({"a": strided}, tmp_path / "a.bin")))
    wanted = raw(strided)
    found = bytearray(len(wanted))
    piece = len(wanted) // 16

    def work(i: int) -> None:
        shard.readers["a"].read(i * piece, memoryview(found)[i * piece : (i + 1) * piece])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
    with shard.readers["a"].mapped(0, 8) as view:
        assert view is None
    shard.readers["a"].read_ahead(0, 8)
    shard.reader.close()


def test_a_strided_reader_reads_what_numpy_does(tmp_path: Path) -> None:
    """The shapes, strides and bytes are random."""
    path = tmp_path / "a.bin"
    shard = open_torch_file(
        str(
            zip_file(
                path,
                pickled_as({"x": tensor(Persistent(("storage", FLOAT, "0", "cpu", 5000)))}),
                {"0": os.urandom(20_000)},
            )
        )
    )
    place = shard.header.tensors[0].start
    data = path.read_bytes()[place : place + 20_000]
    rng = random.Random(4)
    for _ in range(150):
        item = rng.choice([1, 2, 4, 8])
        dims = tuple((rng.randrange(2, 7), rng.randrange(40)) for _ in range(rng.randrange(1, 5)))
        start = rng.randrange(200)
        shape, strides = zip(*dims, strict=True)
        wanted = np.ndarray(shape, f"V{item}", data, start, [stride * item for stride in strides]).tobytes()
        gathered = StridedReader(shard.reader, place + start, dims, item)
        for _ in range(5):
            begin, stop = sorted(rng.choices(range(len(wanted) + 1), k=2))
            found = bytearray(stop - begin)
            gathered.read(begin, found)
            assert found == wanted[begin:stop]
    shard.reader.close()
