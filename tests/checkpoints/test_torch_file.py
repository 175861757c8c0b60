"""PyTorch's .bin files: every tensor is the one that torch loads, nothing in a file is run, and lies are noticed."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from expo.checkpoints import strided_reader, unpickler
from expo.checkpoints.safetensors_header import element_count
from expo.checkpoints.shard import Shard
from expo.checkpoints.strided_reader import StridedReader
from expo.checkpoints.torch_file import open_torch_file
from expo.dtypes import BITS
from expo.errors import CheckpointError

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPE_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


# Files that torch writes


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
    for name, tensor in tensors.items():
        source, wanted = shard.readers[name], raw(tensor)
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
    tensor = numbers(300, 200).t()
    shard = open_torch_file(str(save({"a": tensor}, tmp_path / "a.bin")))
    wanted = raw(tensor)
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


# Files made by hand


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


def test_files_made_by_hand_are_what_torch_reads(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "z.bin", plain(), {"0": FOUR})
    older = Persistent((*STORED.value, None))
    (tmp_path / "l.bin").write_bytes(legacy_bytes(pickled_as({"x": tensor(older)}), {"0": FOUR}))
    for file in (path, tmp_path / "l.bin"):
        check(file, {"x": torch.tensor([1.0, 2, 3, 4])})
        assert torch.load(file, weights_only=False)["x"].tolist() == [1, 2, 3, 4]


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


def test_size_as_a_class_of_its_own(tmp_path: Path) -> None:
    size = Call(Ref("torch Size"), ((2, 2),))
    check(
        zip_file(tmp_path / "a.bin", pickled_as({"x": tensor(size=size, stride=(2, 1))}), {"0": FOUR}),
        {"x": torch.tensor([[1.0, 2], [3, 4]])},
    )


# Files with more than plain weights


@FORMS
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"state_dict": {"x": torch.ones(2)}, "epoch": 3}, "entry 'state_dict' is a dict"),
        ({"x": torch.ones(2), "epoch": 3}, "entry 'epoch' is an int"),
        ({"x": torch.ones(2), "lr": 0.5}, "entry 'lr' is a float"),
        ({"x": torch.ones(2), "why": "not"}, "entry 'why' is a str"),
        ({"x": None}, "entry 'x' is None"),
        ({"x": torch.float16}, "entry 'x' is torch.float16"),
        ({"x": torch.ones(2).untyped_storage()}, "entry 'x' is a storage"),
        ({"x": [torch.ones(2)]}, "entry 'x' is a list"),
        ({"x": (torch.ones(2),)}, "entry 'x' is a tuple"),
        ({0: torch.ones(2)}, "a dict with a key that is not a string"),
        ([torch.ones(2)], "it holds a list, not a dict of tensors"),
        (torch.ones(2), "it holds a tensor, not a dict of tensors"),
        (7, "it holds an int, not a dict of tensors"),
    ],
)  # fmt: skip
def test_other_values_are_named_and_the_fix(tmp_path: Path, zipped: bool, value: Any, what: str) -> None:
    path = save(value, tmp_path / "a.bin", zipped)
    with pytest.raises(CheckpointError) as caught:
        open_torch_file(str(path))
    assert str(caught.value).startswith(f"{path}: not plain weights: ")
    assert what in str(caught.value)
    assert "save model.state_dict() alone, or load it with transformers and save_pretrained() it" in str(caught.value)


class Subclass(torch.Tensor):
    pass


def test_other_tensors_are_refused_by_the_global(tmp_path: Path) -> None:
    for value, name in [
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2).as_subclass(Subclass), "torch._tensor._rebuild_from_type_v2"),
        (torch.empty(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (numbers(2).numpy(), "_reconstruct"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.device("cpu"), "torch.device"),
    ]:
        path = save({"x": value}, tmp_path / "a.bin")
        with pytest.raises(CheckpointError, match=rf"it refers to .*{name}, which is not plain weights; nothing in it"):
            open_torch_file(str(path))
    path = save({"x": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"tensor 'x': it is conjugated or negated"):
        open_torch_file(str(path))
    path = save({"x": {1, 2}}, tmp_path / "a.bin", protocol=4)
    with pytest.raises(CheckpointError, match="its pickle has the instruction EMPTY_SET"):
        open_torch_file(str(path))


# Files that try to do harm


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@FORMS
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool, protocol: int) -> None:
    sentinel = tmp_path / "ran"
    path = save({"x": torch.ones(2), "y": Runs(f"touch {sentinel}")}, tmp_path / "a.bin", zipped, protocol)
    with pytest.raises(CheckpointError, match=r"it refers to posix\.system, which is not plain weights; nothing in it"):
        open_torch_file(str(path))
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # pickle would run it
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("os system", "os.system"),
        ("builtins eval", "builtins.eval"),
        ("collections Counter", "collections.Counter"),
        ("collections abc.sys.modules", "collections.abc.sys.modules"),
        ("torch._utils __builtins__", "torch._utils.__builtins__"),
        ("torch hub.load", "torch.hub.load"),
        ("torch Tensor", "torch.Tensor"),
        ("torch._utils _rebuild_qtensor", "torch._utils._rebuild_qtensor"),
        ("torch.cuda FloatStorage", "torch.cuda.FloatStorage"),
        ("torch.serialization _get_layout", "torch.serialization._get_layout"),
        ("\x1b[2J\x07 é", r"\x1b[2J\x07.é"),
        ("a" * 9000 + " b", "a" * 200 + ".b"),
    ],
)
def test_any_other_global_is_refused(tmp_path: Path, name: str, shown: str) -> None:
    import re

    refused(
        tmp_path, pickled_as({"x": Call(Ref(name), ("true",))}), f"it refers to {re.escape(shown)}, which is not plain"
    )
    module, name = name.rsplit(" ", 1)
    stacked = Call(Code(text(module) + text(name) + b"\x93"), ("true",))
    refused(tmp_path, pickled_as({"x": stacked}), f"it refers to {re.escape(shown)}, which is not plain")


def deep(one: bytes, count: int, start: bytes = b")") -> Code:
    return Code(start + one * count)


TRICKS: dict[str, tuple[Any, str]] = {
    "reduce of text": (Call("os.system", ("true",)), "REDUCE of a str and a tuple"),
    "reduce of a tensor": (Call(tensor(), ()), "REDUCE of a tensor and a tuple"),
    "reduce with a list": (Call(V2, [1]), "REDUCE of torch._utils._rebuild_tensor_v2 and a list"),
    "reduce of a storage class": (Call(FLOAT, (4,)), "it calls torch.FloatStorage with 1 arguments"),
    "reduce of a dtype": (Call(Ref("torch float16"), ()), "it calls torch.float16"),
    "size of a number": (Call(Ref("torch Size"), (1 << 40,)), "it calls torch.Size with 1 arguments"),
    "dict with two arguments": (Call(Ref("collections OrderedDict"), ([], [])), "with 2 arguments"),
    "dict of a number": (Call(Ref("collections OrderedDict"), (3,)), "an OrderedDict of an int"),
    "dict of no pairs": (Call(Ref("collections OrderedDict"), ([[1]],)), "an OrderedDict of a list"),
    "dict that writes itself": (Code(b"}q\x00Xzzzz"), "a string of"),
    "build of a tensor": (Code(assembled(tensor()) + b"}b"), "it gives a tensor a state that is a dict"),
    "build of a global": (Code(assembled(V2) + assembled({"__code__": 1}) + b"b"), "a state that is a dict"),
    "build of a dict with a global": (Code(assembled(HOOKS) + assembled(V2) + b"b"), "it gives a dict a state"),
    "newobj": (Code(assembled(V2) + b")\x81"), "the instruction NEWOBJ,"),
    "newobj_ex": (Code(assembled(V2) + b")}\x92"), "the instruction NEWOBJ_EX,"),
    "inst": (Code(b"(ios\nsystem\n"), "the instruction INST,"),
    "obj": (Code(b"(" + assembled(V2) + b"o"), "the instruction OBJ,"),
    "ext": (Code(b"\x82\x01"), "the instruction EXT1,"),
    "persistent id as text": (Code(b"P0\n"), "the instruction PERSID,"),
    "a string with escapes": (Code(b"S'\\q'\n"), "the instruction STRING,"),
    "a global with escapes": (Code(b"co\\q\nsystem\n"), r"it refers to o\\\\q\.system"),
    "out of band": (Code(b"\x97"), "the instruction NEXT_BUFFER,"),
    "a module": (Persistent(("module", FLOAT, "a.py", "source", 1)), "it has a tuple in place of a storage"),
    "persistent number": (Persistent(5), "it has an int in place of a storage"),
    "persistent bytes": (Persistent((Code(b"C\x01s"), FLOAT, "0", "cpu", 4)), "it has a tuple in place of a storage"),
    "persistent dict": (Persistent({}), "it has a dict in place of a storage"),
    "short persistent": (Persistent(("storage",)), "it has a tuple in place of a storage"),
    "storage of no class": (Persistent(("storage", "torch FloatStorage", "0", "cpu", 4)), "not its class, key"),
    "storage of a function": (Persistent(("storage", V2, "0", "cpu", 4)), "not its class, key"),
    "storage with no key": (Persistent(("storage", FLOAT, 0, "cpu", 4)), "not its class, key"),
    "storage of True": (Persistent(("storage", FLOAT, "0", "cpu", True)), "not its class, key"),
    "storage of minus 1": (Persistent(("storage", FLOAT, "0", "cpu", -1)), "not its class, key"),
    "storage of 2^63": (Persistent(("storage", FLOAT, "0", "cpu", 1 << 63)), "not its class, key"),
    "storage nowhere": (Persistent(("storage", FLOAT, "0", 3, 4)), "not its class, key"),
    "part of a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, [])), "the part of a storage is not"),
    "part before a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, ("a", -1, 4))), "the part of a storage is"),
    "part past a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, ("a", 1, 1 << 62))), "of 4 elements"),
    "two sizes": (Code(assembled(STORED) + assembled(Persistent(("storage", FLOAT, "0", "cpu", 5)))), "and again of 5"),
    "two types": (
        Code(assembled(STORED) + assembled(Persistent(("storage", Ref("torch HalfStorage"), "0", "cpu", 4)))),
        "is of 4 torch.float32, and again of 4 torch.float16",
    ),
    "number of arguments": (Call(V2, (STORED, 0, (4,), (1,), False)), "5 arguments of torch._utils._rebuild_tensor_v2"),
    "v3 without a dtype": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS)), "6 arguments of"),
    "v3 with text": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, "torch.float32")), "dtype unknown is none of"),
    "v3 with a class": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, FLOAT)), "dtype unknown is none of"),
    "v3 beyond": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, Ref("torch int64"))), "byte 32 .* has 16"),
    "tensor of a tensor": (tensor(tensor()), "tensor 'x': it is not made of a storage"),
    "tensor of None": (tensor(None), "tensor 'x': it is not made of a storage"),
    "gradients of 1": (Call(V2, (STORED, 0, (4,), (1,), 1, HOOKS)), "tensor 'x': it is not made of a storage"),
    "hooks": (Call(V2, (STORED, 0, (4,), (1,), False, {"0": V2})), "tensor 'x': it has hooks, a dict"),
    "hooks of another kind": (Call(V2, (STORED, 0, (4,), (1,), False, [1])), "tensor 'x': it has hooks, a list"),
    "negated": (tensor(more=({"neg": True},)), "tensor 'x': it is conjugated or negated"),
    "metadata of text": (tensor(more=("neg",)), "tensor 'x': it is conjugated or negated"),
    "parameter of text": (Call(PARAMETER, ("x", True, HOOKS)), "tensor 'x': a parameter not made of"),
    "parameter of two": (Call(PARAMETER, (tensor(), True)), "tensor 'x': a parameter not made of"),
    "parameter of a parameter": (
        Call(PARAMETER, (Call(PARAMETER, (tensor(), True, HOOKS)), True, HOOKS)),
        "3 arguments of torch._utils._rebuild_parameter, not those of a tensor",
    ),
    "parameter with hooks": (Call(PARAMETER, (tensor(), True, {"a": 1})), "a parameter not made of"),
    "offset of True": (tensor(offset=True), "are not whole numbers"),
    "negative offset": (tensor(offset=-1), "are not whole numbers"),
    "offset of 2^63": (tensor(offset=1 << 63), "are not whole numbers"),
    "offset past the end": (tensor(offset=1), r"shape \[4\], strides \[1\] and offset 1 end at byte 20 .*which has 16"),
    "far offset": (tensor(offset=(1 << 63) - 1), "end at byte .*, which has 16"),
    "shape of True": (tensor(size=(True,)), "are not whole numbers"),
    "shape of halves": (tensor(size=(0.5,)), "are not whole numbers"),
    "shape as a list": (tensor(size=[4]), "are not whole numbers"),
    "negative shape": (tensor(size=(-4,)), "are not whole numbers"),
    "shape of 2^61": (tensor(size=(1 << 61,)), r"shape \[2305843009213693952\] of torch.float32 is over 2\^63 bytes"),
    "shape of huge product": (tensor(size=(1 << 62,) * 60, stride=(0,) * 60), r"over 2\^63 bytes"),
    "shape past the end": (tensor(size=(5,)), "end at byte 20 of storage '0', which has 16"),
    "negative stride": (tensor(stride=(-1,)), "are not whole numbers"),
    "huge stride": (tensor(size=(2,), stride=((1 << 63) - 1,)), "end at byte 36893488147419103232"),
    "more strides": (tensor(stride=(1, 1)), "are not whole numbers"),
    "65 dimensions": (tensor(size=(1,) * 65, stride=(1,) * 65), "65 dimensions, but at most 64"),
    "a number of many bits": (Code(b"\x8a\xff" + b"\x7f" * 255), "a number of 2039 bits"),
    "a number of claimed gigabytes": (Code(b"\x8b\xff\xff\xff\x7f"), "a string of 2147483647 bytes"),
    "text of claimed gigabytes": (Code(b"X\xff\xff\xff\xff"), "a string of 4294967295 bytes"),
    "text of claimed exabytes": (Code(b"\x8d" + b"\xff" * 7 + b"\x0f"), "a string of"),
    "text of more than exabytes": (Code(b"\x8d" + b"\xff" * 8), "cannot be read at byte"),
    "bytes of claimed gigabytes": (Code(b"B\xff\xff\xff\xff"), "a string of 4294967295 bytes"),
    "bytes of claimed exabytes": (Code(b"\x8e" + b"\xff" * 7 + b"\x0f"), "a string of"),
    "a bytearray": (Code(b"\x96" + b"\xff" * 7 + b"\x0f"), "the instruction BYTEARRAY8,"),
    "negative text": (Code(b"T\xff\xff\xff\xff"), "cannot be read at byte"),
    "a frame of exabytes": (Code(b"\x95" + b"\xff" * 8 + b"X"), "cannot be read at byte|a string of"),
    "a far memo": (Code(b"}r\xff\xff\xff\xffj\xfe\xff\xff\xff"), "it reads value 4294967294 of its memo"),
    "a memo of nothing": (Code(b"(q\x00"), "cannot be read at byte"),
    "text that is not UTF-8": (Code(b"X\x02\x00\x00\x00\xff\xfe"), "cannot be read at byte"),
    "a global that is not UTF-8": (Code(b"c\xff\nb\n"), "cannot be read at byte"),
    "a global without an end": (Code(b"c" + b"a" * 100_000), "a name that does not end|cannot be read"),
    "no such instruction": (Code(b"\xff"), "no such instruction"),
    "nothing marked": (Code(b"tttt"), "cannot be read at byte"),
    "nothing there": (Code(b"\x87"), "a tuple of more values than there are"),
    "append to a dict": (Code(b"}Na"), "APPEND to what is not a list"),
    "items of a list": (Code(b"]NNs"), "SETITEM of what is not a dict"),
    "half an item": (Code(b"}(Nu"), "SETITEM of what is not a dict, or of half an item"),
    "stack global of numbers": (Code(b"K\x01K\x02\x93"), "STACK_GLOBAL of what is not a name"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks(tmp_path: Path, trick: str) -> None:
    value, match = TRICKS[trick]
    refused(tmp_path, pickled_as({"x": value}), match)


def test_deep_and_wide_values(tmp_path: Path) -> None:
    """A tuple in a tuple, 30000 deep; the same as a key, whose hash would overflow the stack; and 2^30000 elements."""
    for one in (b"\x85", b"]\x85", b"}\x86", b"h\x00\x86", b"\x94h\x00\x86"):
        value = Code(b")q\x00" + (b")" if b"\x86" in one else b"") + one * 30_000)
        refused(tmp_path, pickled_as({"x": value}), "entry 'x' is a tuple|cannot be read", most=0)
    double = Code(b")" + b"q\x01h\x01\x86" * 10_000)
    refused(tmp_path, pickled_as({"x": double}), "entry 'x' is a tuple", most=0)
    refused(tmp_path, b"\x80\x02}" + double.code + b"Ns.", "a key that is not a string", most=0)
    nested = Code(assembled(PARAMETER) * 10_000 + b")" + b"R\x85" * 10_000)
    refused(tmp_path, pickled_as({"x": nested}), "entry 'x' is a tuple", most=0)
    refused(tmp_path, b"\x80\x02]q\x00h\x00a.", "it holds a list")
    refused(tmp_path, b"\x80\x02}q\x00" + text("x") + b"h\x00s.", "entry 'x' is a dict")
    refused(tmp_path, b"\x80\x02.", "cannot be read at byte")
    refused(tmp_path, b"\x80\x02" + b"(" * 10_000 + b".", "cannot be read at byte")


def test_a_million_small_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickler, "MAX_STEPS", 10_000)
    refused(tmp_path, b"\x80\x02" + b"}" * 1_000_000 + b".", "a pickle of over 10000 instructions; not plain weights")
    pairs = b"](" + b"]K\x01aK\x02a" * 1000 + b"e\x85q\x00"
    shared = b"\x80\x02" + assembled(Ref("collections OrderedDict")) + b"q\x01" + pairs + b"h\x01h\x00R" * 1000 + b"."
    refused(tmp_path, shared, "a pickle of over 10000 instructions")


def test_a_pickle_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    save({"x": torch.ones(2)}, path, zipped=False)
    head = path.read_bytes()[:137]
    for code in (b"X\xff\xff\xff\xff", b"N" * 9, b"c", b"\x8b\xff\xff\xff\x7f"):
        path.write_bytes(head + b"\x80\x02" + code)
        os.truncate(path, 3 << 30)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=r"its pickle|plain weights"):
                open_torch_file(str(path))
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_more_strided_dimensions_than_numpy_has(tmp_path: Path) -> None:
    stored = Persistent(("storage", FLOAT, "0", "cpu", 40))
    strided = tensor(stored, 0, (2,) * 33, (1, 0) * 16 + (1,))
    refused(tmp_path, pickled_as({"x": strided}), "'x': 33 strided dimensions, but at most 32", {"0": bytes(160)})


def test_names_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    for name in ("\ud800", "__metadata__"):
        refused(tmp_path, pickled_as({name: tensor()}), "has a name that safetensors cannot hold")
    refused(tmp_path, pickled_as({"x": tensor()})[:-1] + text("x") + b"Ns.", "'x' occurs twice in a dict")


# Damaged zip files


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


# Damaged older files


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
    gives("its type sizes are not", legacy_bytes(plain(), {"0": FOUR}, system={**SYSTEM, "type_sizes": {"short": 4}}))
    gives("its list of storages is not one", legacy_bytes(plain(), {"1": FOUR}))
    gives("its list of storages is not one", legacy_bytes(plain(), {"0": FOUR}, keys=[["0"]]))
    gives("its list of storages is not one", legacy_bytes(plain(), {"0": FOUR}, keys="0"))
    gives("storage '0' occurs twice", legacy_bytes(plain(), {"0": FOUR}, keys=["0", "0"]) + FOUR * 2)
    gives("tensor 'x': it is in storage '0', which is not in the file", legacy_bytes(plain(), {}))
    gives("storage '0' has 4 elements to the pickle, but 2 at", legacy_bytes(plain(), {"0": FOUR}, item=8))
    gives(f"last storage ends at byte {len(good)}, but the file has {len(good) + 1}", good + b"1")
    gives(f"ends at byte {len(good)}, but the file has {len(good) - 1}: truncated", good[:-1])
    gives("its first pickles are not 0x1950a86a20f9469cfc6c and 1001", good.replace(b"M\xe9\x03.", b"M\xea\x03.", 1))


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


def test_a_strided_reader_reads_what_numpy_does(tmp_path: Path) -> None:
    """The shapes, strides and bytes are random."""
    import numpy as np

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
