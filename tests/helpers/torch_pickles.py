"""Write files of PyTorch's own format, by torch or from single instructions of a pickle."""

from __future__ import annotations

import pickle
import random
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from expo.checkpoints.shard import Shard
from expo.checkpoints.torch_file import open_torch_file
from expo.errors import CheckpointError

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPE_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def save(value: Any, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in C order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(shard: Shard, cuts: random.Random | None = None) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return all tensors, each read in pieces of random lengths through its own reader."""
    found = {}
    for tensor in shard.header.tensors:
        source = shard.readers.get(tensor.name, shard.reader)
        assert tensor.name not in shard.readers or tensor.start == 0
        marks = sorted(cuts.choices(range(tensor.nbytes + 1), k=4)) if cuts else []
        data = bytearray(tensor.nbytes)
        for start, stop in zip([0, *marks], [*marks, tensor.nbytes], strict=True):
            if start < stop:
                source.read(tensor.start + start, memoryview(data)[start:stop])
        found[tensor.name] = (tensor.dtype, tensor.shape, bytes(data))
    return found


def check(path: Path, tensors: Mapping[str, torch.Tensor]) -> Shard:
    """Assert that the file has these tensors, whatever the pieces that are read, and return its shard."""
    shard = open_torch_file(str(path))
    wanted = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape), raw(t)) for name, t in tensors.items()}
    for seed in range(5):
        assert read(shard, random.Random(seed)) == wanted
    assert shard.size == path.stat().st_size
    order = [(tensor.start, tensor.name) for tensor in shard.header.tensors]
    assert order == sorted(order)
    assert shard.header.metadata == {}
    shard.reader.close()
    return shard


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


class Ref(NamedTuple):
    """The instruction GLOBAL, with its name."""

    name: str


class Call(NamedTuple):
    """The instruction REDUCE, with its function and arguments."""

    function: Any
    arguments: Any


class Persistent(NamedTuple):
    """The instruction BINPERSID, with its value."""

    value: Any


class Code(NamedTuple):
    """The bytes of any instructions."""

    code: bytes


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def assembled(value: Any) -> bytes:
    """Return the instructions that put a value on the stack."""
    if isinstance(value, Code):
        return value.code
    if isinstance(value, Ref):
        module, name = value.name.rsplit(" ", 1)
        return f"c{module}\n{name}\n".encode()
    if isinstance(value, Call):
        return assembled(value.function) + assembled(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return assembled(value.value) + b"Q"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return b"}(" + b"".join(assembled(key) + assembled(item) for key, item in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(assembled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(assembled, value)) + b"e"
    return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP


def pickled_as(value: Any) -> bytes:
    return b"\x80\x02" + assembled(value) + b"."


V2, V3 = Ref("torch._utils _rebuild_tensor_v2"), Ref("torch._utils _rebuild_tensor_v3")
PARAMETER, HOOKS = Ref("torch._utils _rebuild_parameter"), Call(Ref("collections OrderedDict"), ())
FLOAT = Ref("torch FloatStorage")
STORED = Persistent(("storage", FLOAT, "0", "cpu", 4))


def tensor(
    storage: Any = STORED, offset: Any = 0, size: Any = (4,), stride: Any = (1,), more: tuple[Any, ...] = ()
) -> Call:
    return Call(V2, (storage, offset, size, stride, False, HOOKS, *more))


def plain() -> bytes:
    return pickled_as({"x": tensor()})


def zip_file(
    path: Path, pickled: bytes, storages: Mapping[str, bytes], first: Mapping[str, bytes] | None = None, **more: Any
) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **more) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of names that occur twice
        for name, data in (first or {}).items():
            archive.writestr(name, data)
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def legacy_bytes(
    pickled: bytes, storages: Mapping[str, bytes], item: int = 4, system: Any = SYSTEM, keys: Any = None
) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, system]
    parts = [*(pickle.dumps(value, 2) for value in head), pickled, pickle.dumps(keys or list(storages), 2)]
    parts += [(len(data) // item).to_bytes(8, "little") + data for data in storages.values()]
    return b"".join(parts)


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def refused(
    tmp_path: Path, pickled: bytes, match: str, storages: Mapping[str, bytes] | None = None, most: int = 4 << 20
) -> None:
    """Assert that both forms of file with this pickle give this error, in little memory.

    `most` is the limit in bytes; 0 leaves out the measurement, which takes time.
    """
    storages = {"0": FOUR} if storages is None else storages
    (tmp_path / "l.bin").write_bytes(legacy_bytes(pickled, storages))
    for path in (zip_file(tmp_path / "z.bin", pickled, storages), tmp_path / "l.bin"):
        if most:
            tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=match) as caught:
                open_torch_file(str(path))
            assert not most or tracemalloc.get_traced_memory()[1] < most
        finally:
            tracemalloc.stop()
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value)) < 2000
