"""PyTorch's .bin files, read without torch and without running anything that is in them.

Such a file is a pickle, whose instructions build a dict of tensors, and storages, runs of bytes that the tensors are
views of: an offset, a shape and a stride for each dimension. Two forms, both of which can be mapped:

- a zip file (since torch 1.6): PREFIX/data.pkl, and each storage as it is in memory in an entry PREFIX/data/KEY;
- before that, pickles one after another: a magic number, the version, the machine's type sizes, the dict, the list of
  the storages' keys; then for each key an int64 number of elements, and the elements.

Source: github.com/pytorch/pytorch, torch/serialization.py (_save, _load, _legacy_save, _legacy_load), torch/_utils.py
(_rebuild_tensor_v2 and those below it) and torch/storage.py (_dtype_to_storage_type_map).

Whoever loads a pickle runs what its author wants, so none is loaded: its instructions are carried out here, the few
that tensors take, on values that do nothing. What they name is compared with a list and never looked up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..dtypes import BITS, FROM_TORCH
from ..errors import CheckpointError
from .reader import FileReader, Identity, open_regular_file
from .safetensors_header import Header, TensorInfo, element_count, is_unicode
from .shard import Shard

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_PICKLE = 100_000_000  # bytes, as of a safetensors header
MAX_STEPS = 4_000_000  # instructions of a pickle; a tensor takes some 30
MAX_TEXT = 1 << 16  # bytes of a string in it
MAX_DIRECTORY = 1 << 24  # bytes of a zip file's directory; a storage takes some 100
MAX_DIMS = 64  # of a tensor, as in torch
MAX_STRIDED_DIMS = 32  # of one that has to be gathered: what all versions of NumPy can do
SCRATCH = 1 << 20  # bytes that are read at once at most
GAP = 1 << 13  # bytes between two elements that are sooner read than skipped
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
FIX = "save model.state_dict() alone, or load it with transformers and save_pretrained() it"

# Bytes per element of the dtypes that torch has and safetensors has not.
_OTHERS = {
    "complex32": 4, "complex128": 16, "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "bits8": 1,
    "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "float4_e2m1fn_x2": 1,
}  # fmt: skip
_ITEMSIZE = {**{torch: BITS[name] // 8 for torch, name in FROM_TORCH.items()}, **_OTHERS}

# What a pickle may refer to, as "module name": classes of storages, with the dtypes that these stand for; dtypes; the
# functions that build a tensor and a parameter, with the number of arguments that each takes.
_STORAGES = {
    "torch BoolStorage": "bool", "torch ByteStorage": "uint8", "torch CharStorage": "int8",
    "torch ShortStorage": "int16", "torch IntStorage": "int32", "torch LongStorage": "int64",
    "torch HalfStorage": "float16", "torch BFloat16Storage": "bfloat16", "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64", "torch ComplexFloatStorage": "complex64",
    "torch ComplexDoubleStorage": "complex128", "torch QUInt8Storage": "quint8", "torch QInt8Storage": "qint8",
    "torch QInt32Storage": "qint32", "torch QUInt4x2Storage": "quint4x2", "torch QUInt2x4Storage": "quint2x4",
    "torch UntypedStorage": "uint8", "torch.storage UntypedStorage": "uint8",
}  # fmt: skip
_DTYPES = {f"torch {name}": name for name in _ITEMSIZE}
_TENSORS = {"torch._utils _rebuild_tensor_v2": (6, 7), "torch._utils _rebuild_tensor_v3": (7, 8)}
_PARAMETERS = {"torch._utils _rebuild_parameter": 3, "torch._utils _rebuild_parameter_with_state": 4}
_DICT, _SIZE = "collections OrderedDict", "torch Size"
_GLOBALS = {*_STORAGES, *_DTYPES, *_TENSORS, *_PARAMETERS, _DICT, _SIZE}


class _Global(NamedTuple):
    """What stands for something that a pickle refers to."""

    name: str


class _Called(NamedTuple):
    """What stands for the result of a function."""

    function: str
    arguments: tuple[Any, ...]


class _Storage(NamedTuple):
    """Elements [first, first + length) of the storage with this key, which has `total`. dtype: torch's name."""

    key: str
    dtype: str
    total: int
    first: int
    length: int


class _View(NamedTuple):
    """A tensor: its first element is the storage's with number `offset`, counted in elements of its own dtype."""

    name: str
    dtype: str
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch_file(path: str) -> Shard:
    """Read and check the pickle of a file that torch.save wrote, and no storage.

    Returns:
        The shard. A tensor whose elements do not lie in the file one after another has a reader of its own, and its
        TensorInfo has start 0.

    Raises:
        CheckpointError: The file is damaged, or holds more than plain tensors.
    """
    digest = hashlib.sha256()
    try:
        with open_regular_file(path) as file:
            identity = Identity.of(file.fileno())
            form = _form(path, file.read(512), identity.size)
            views, places = form(path, file, identity.size, digest)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    reader = FileReader(path, identity)
    tensors, readers = _placed(path, reader, views, places)
    digest.update(repr(sorted(places.items())).encode("utf-8"))  # now of the pickle and of the storages' places
    return Shard(path, identity.size, Header(tensors, {}), digest.hexdigest(), reader, readers)


def _placed(
    path: str, reader: FileReader, views: Sequence[_View], places: Mapping[str, int]
) -> tuple[tuple[TensorInfo, ...], dict[str, Gathered]]:
    """Return the tensors, sorted by their places in the file, and the readers of those that are not contiguous."""
    tensors, readers = [], {}
    for view in views:
        first, nbytes, dims = _checked(path, view)
        start = places[view.storage.key] + first
        if dims and dims != ((dims[0][0], 1),):
            readers[view.name] = Gathered(reader, start, dims, _ITEMSIZE[view.dtype])
            start = 0
        tensors.append(TensorInfo(view.name, FROM_TORCH[view.dtype], view.shape, start, start + nbytes))
    return tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.name))), readers


def _checked(path: str, view: _View) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Byte of the storage that the tensor starts at, its bytes, and its dimensions as few as they can be."""
    item, storage = _ITEMSIZE[view.dtype], view.storage
    held = storage.length * _ITEMSIZE[storage.dtype]
    nbytes = element_count(view.shape) * item
    if nbytes >= 2**63:
        raise _wrong(path, view.name, f"shape {list(view.shape)} of torch.{view.dtype} is over 2^63 bytes")
    if not nbytes:
        return 0, 0, ()
    last = view.offset + sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
    if (last + 1) * item > held:
        raise _wrong(
            path,
            view.name,
            f"shape {list(view.shape)}, strides {list(view.strides)} and offset {view.offset} end at byte "
            f"{(last + 1) * item} of storage {storage.key!r}, which has {held}",
        )
    dims = _merged(view.shape, view.strides)
    if len(dims) > MAX_STRIDED_DIMS:
        raise _wrong(path, view.name, f"{len(dims)} strided dimensions, but at most {MAX_STRIDED_DIMS} can be read")
    return storage.first * _ITEMSIZE[storage.dtype] + view.offset * item, nbytes, dims


def _merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(length, stride) of each dimension, without those of length 1; two become one where one stride does for both."""
    dims: list[tuple[int, int]] = []
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1] == length * stride:
            length *= dims.pop()[0]
        dims.append((length, stride))
    return tuple(dims)


def _wrong(path: str, tensor: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {tensor!r}: {what}")


# What reads a form of file: from path, file, its size and a hash that the pickle goes into, the tensors and the byte
# that each storage starts at.
_Form = Callable[[str, BinaryIO, int, "_Hash"], tuple[list[_View], dict[str, int]]]


def _form(path: str, first: bytes, size: int) -> _Form:
    """What reads the file that starts with these bytes; CheckpointError if nothing does."""
    if first.startswith(b"PK\x03\x04"):
        return _from_zip
    if first.startswith(b"\x80") and MAGIC.to_bytes(10, "little") in first[:32]:
        return _from_pickles
    if not first:
        what = "an empty file; download it again"
    elif first.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    elif first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, not the file itself; download it again, from the address that the page links to"
    elif first[257:262] == b"ustar":
        what = "in the tar format of the first versions of torch; load it with torch, and torch.save() it"
    elif first[8:9] == b"{" and 8 + int.from_bytes(first[:8], "little") <= size:
        what = "a safetensors file by another name; rename it to .safetensors"
    else:
        what = f"{size} bytes that start with {first[:8]!r}, which is nothing that torch.save writes; download it again"
    raise CheckpointError(f"{path}: {what}")


# The zip file


def _from_zip(path: str, file: BinaryIO, size: int, digest: _Hash) -> tuple[list[_View], dict[str, int]]:
    entries = _directory(path, file)
    prefix = _prefix(path, entries)
    pickle = entries[f"{prefix}data.pkl"]
    used = {pickle.filename: (pickle.header_offset, _start(path, file, size, pickle) + pickle.file_size)}
    if f"{prefix}byteorder" in entries:
        start = _start(path, file, size, entries[f"{prefix}byteorder"])
        order = os.pread(file.fileno(), min(16, entries[f"{prefix}byteorder"].file_size), start)
        if order != b"little":
            raise CheckpointError(f"{path}: its bytes are in the order {order!r}, but only 'little' is read")
    if pickle.file_size > MAX_PICKLE:
        raise CheckpointError(
            f"{path}: a pickle of {pickle.file_size} bytes, but at most {MAX_PICKLE} are read; not plain weights?"
        )
    stream = _Stream(file, used[pickle.filename][1] - pickle.file_size, pickle.file_size, digest)
    views = _views(path, _Machine(path, stream, {}).run())
    places: dict[str, int] = {}
    for view in views:
        if view.storage.key not in places:
            entry = _entry(path, view, entries, prefix)
            places[view.storage.key] = start = _start(path, file, size, entry)
            used[entry.filename] = (entry.header_offset, start + entry.file_size)
    _check_apart(path, used)
    return views, places


class _Limited:
    """A file for zipfile, which would read a directory of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            raise ValueError(f"a directory of {count} bytes, but at most {MAX_DIRECTORY} are read")
        return self._file.read(count if count >= 0 else 1 << 17)  # it reads on from the record at the end: 65557 bytes


def _directory(path: str, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. zipfile means nothing by the kind of error that a damaged directory gives."""
    limited: Any = _Limited(file)
    try:
        with zipfile.ZipFile(limited) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: it starts like a zip file of torch.save, but the directory at its end cannot be read ({error}): "
            "truncated? download it again"
        ) from error
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        if entry.filename in entries:
            raise CheckpointError(f"{path}: {entry.filename!r} stands twice in the zip file")
        entries[entry.filename] = entry
    return entries


def _prefix(path: str, entries: dict[str, zipfile.ZipInfo]) -> str:
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise CheckpointError(f"{path}: a zip file with {len(found)} entries */data.pkl, but torch.save writes one")
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise CheckpointError(f"{path}: a TorchScript program, which is not plain weights; {FIX}")
    return prefix


def _entry(path: str, view: _View, entries: dict[str, zipfile.ZipInfo], prefix: str) -> zipfile.ZipInfo:
    """The entry with the tensor's storage, which has as many bytes as the pickle says."""
    storage = view.storage
    entry = entries.get(f"{prefix}data/{storage.key}")
    if entry is None:
        raise _wrong(path, view.name, f"it is in storage {storage.key!r}, which is not in the file; download it again")
    nbytes = storage.total * _ITEMSIZE[storage.dtype]
    if entry.file_size != nbytes:
        raise _wrong(
            path,
            view.name,
            f"storage {storage.key!r} has {storage.total} elements of torch.{storage.dtype}, {nbytes} bytes, but "
            f"{entry.file_size} bytes in the file",
        )
    return entry


def _start(path: str, file: BinaryIO, size: int, entry: zipfile.ZipInfo) -> int:
    """The byte of the file that an entry's content starts at. The lengths are those before it, not the directory's."""
    where = f"{path}: zip entry {entry.filename!r}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{where} is compressed or encrypted, as torch.save leaves none; unzip and zip -0 it")
    at = entry.header_offset
    local = os.pread(file.fileno(), 30, at) if 0 <= at < size else b""
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{where} is said to start at byte {at} of {size}, but does not; download it again")
    before, extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:], "little")
    name = os.pread(file.fileno(), before, at + 30)
    if name.decode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace") != entry.orig_filename:
        raise CheckpointError(f"{where} has the name {name!r} at byte {at}; download it again")
    start = at + 30 + before + extra
    if start + entry.file_size > size:
        raise CheckpointError(
            f"{where} ends at byte {start + entry.file_size}, but the file has {size}: truncated; download it again"
        )
    return start


def _check_apart(path: str, used: dict[str, tuple[int, int]]) -> None:
    """That no two zip entries have bytes in common."""
    end, before = 0, ""
    for name, (start, stop) in sorted(used.items(), key=lambda item: item[1]):
        if start < end:
            raise CheckpointError(f"{path}: zip entry {name!r} starts at byte {start}, but {before!r} ends at {end}")
        end, before = stop, name


# The older form


def _from_pickles(path: str, file: BinaryIO, size: int, digest: _Hash) -> tuple[list[_View], dict[str, int]]:
    stream = _Stream(file, 0, min(size, MAX_PICKLE), digest)
    magic, version, system = (_Machine(path, stream, {}).run() for _ in range(3))
    if type(magic) is not int or magic != MAGIC or type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path}: its first pickles are not {MAGIC:#x} and {VERSION}; download it again")
    _check_system(path, system)
    storages: dict[str, _Storage] = {}
    views = _views(path, _Machine(path, stream, storages).run())
    keys = _Machine(path, stream, {}).run()
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise CheckpointError(f"{path}: its list of storages is not one of those that its tensors are in")
    places, end = _follow(path, file, size, stream.position, [storages[key] for key in keys])
    for view in views:
        if view.storage.key not in places:
            raise _wrong(path, view.name, f"it is in storage {view.storage.key!r}, which is not in the file")
    if end != size:
        raise CheckpointError(
            f"{path}: its last storage ends at byte {end}, but the file has {size}; download it again"
        )
    return views, places


def _check_system(path: str, system: Any) -> None:
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: it was written on a machine with big-endian numbers, which are not read")
    sizes = system.get("type_sizes")
    if type(sizes) is not dict or [sizes.get(name) for name in ("short", "int", "long")] != [2, 4, 4]:
        raise CheckpointError(f"{path}: its type sizes are not 2, 4 and 4 bytes of short, int and long")


def _follow(path: str, file: BinaryIO, size: int, at: int, storages: Sequence[_Storage]) -> tuple[dict[str, int], int]:
    """Where each storage starts, of those that follow one another from byte `at` on, and where the last one ends."""
    places: dict[str, int] = {}
    for storage in storages:
        if storage.key in places:
            raise CheckpointError(f"{path}: storage {storage.key!r} stands twice in it")
        count = int.from_bytes(os.pread(file.fileno(), 8, at), "little", signed=True)
        places[storage.key] = at + 8
        at += 8 + storage.total * _ITEMSIZE[storage.dtype]
        if at > size:
            raise CheckpointError(
                f"{path}: storage {storage.key!r} ends at byte {at}, but the file has {size}: truncated; "
                "download it again"
            )
        if count != storage.total:
            raise CheckpointError(
                f"{path}: storage {storage.key!r} has {storage.total} elements to the pickle, but {count} at byte "
                f"{places[storage.key] - 8}; download it again"
            )
    return places, at


# The pickle


class _Stream:
    """Bytes [start, start + length) of an open file, in small pieces; each goes into the digest."""

    def __init__(self, file: BinaryIO, start: int, length: int, digest: _Hash) -> None:
        file.seek(start)
        self._file, self._length, self._digest = file, length, digest
        self.position = 0

    def read(self, count: int) -> bytes:
        if count > MAX_TEXT:
            raise ValueError(f"a string of {count} bytes, but at most {MAX_TEXT} are read")
        return self._read(count, self._file.read)

    def readline(self) -> bytes:
        return self._read(MAX_TEXT, self._file.readline)

    def _read(self, count: int, read: Callable[[int], bytes]) -> bytes:
        piece = read(min(count, self._length - self.position))
        if count and not piece:
            raise ValueError(f"no end within {self._length} bytes")
        self.position += len(piece)
        self._digest.update(piece)
        return piece


# Instructions that put what follows them on the stack.
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class _Machine:
    """Carries out the instructions of one pickle, on values that stand for what it would build.

    Of these only strings are ever hashed or compared, and none is walked through: a pickle can nest values a million
    deep, or make a few that are larger than any memory once they are written out. Dicts keep the values of keys that
    are not strings under None.
    """

    def __init__(self, path: str, stream: _Stream, storages: dict[str, _Storage]) -> None:
        """storages: what takes those that the pickle names, by their keys."""
        self._path, self._stream, self._storages = path, stream, storages
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks of before each mark
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._instructions: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None, "FRAME": lambda _: None, "MARK": self._mark,
            "TUPLE": lambda _: self._push(tuple(self._marked())), "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2), "TUPLE3": lambda _: self._tuple(3),
            "EMPTY_LIST": lambda _: self._push([]), "EMPTY_DICT": lambda _: self._push({}),
            "APPEND": lambda _: self._append([self._stack.pop()]), "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": self._set_item, "SETITEMS": lambda _: self._set(self._marked()),
            "BINPUT": self._put, "LONG_BINPUT": self._put, "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET": self._get, "LONG_BINGET": self._get, "SHORT_BINSTRING": self._string, "BINSTRING": self._string,
            "GLOBAL": self._global, "STACK_GLOBAL": self._stack_global, "REDUCE": self._reduce, "BUILD": self._build,
            "BINPERSID": self._persistent,
        }  # fmt: skip

    def run(self) -> Any:
        """What the pickle builds. Raises CheckpointError, and OSError."""
        at = self._stream.position
        try:
            while True:
                at = self._stream.position
                opcode = _CODES.get(self._stream.read(1))
                if opcode is None:
                    raise ValueError("no such instruction")
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._count(1)
                self._step(opcode)
        except (ValueError, IndexError, struct.error) as error:
            raise CheckpointError(
                f"{self._path}: its pickle cannot be read at byte {at} ({error}): damaged, or not of torch.save; "
                "download it again"
            ) from error

    def _step(self, opcode: pickletools.OpcodeInfo) -> None:
        name, stream = opcode.name, self._stream
        if name in _CONSTANTS:
            self._push(_CONSTANTS[name])
            return
        if name not in _LITERALS and name not in self._instructions:
            raise self._refused(f"its pickle has the instruction {name}")
        # pickletools would warn of what is after a backslash in the two lines of a GLOBAL.
        argument = opcode.arg.reader(stream) if opcode.arg and name != "GLOBAL" else None  # type: ignore[arg-type]
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > 127:
                raise ValueError(f"a number of {argument.bit_length()} bits")
            self._push(argument)
        else:
            self._instructions[name](argument)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise CheckpointError(f"{self._path}: a pickle of over {MAX_STEPS} instructions; not plain weights? {FIX}")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}, which is not plain weights; nothing in it was run; {FIX}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise ValueError("a tuple of more values than there are")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("APPEND to what is not a list")
        self._stack[-1].extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) is not dict or len(items) % 2:
            raise ValueError("SETITEM of what is not a dict, or of half an item")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str and key in into:
                raise ValueError(f"{key!r} stands twice in a dict")
            into[key if type(key) is str else None] = value

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _get(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError(f"it takes up value {number}, which there is not")
        self._push(self._memo[number])

    def _string(self, text: str) -> None:
        """What Python 2 wrote; pickletools makes characters of its bytes."""
        self._push(text.encode("latin-1").decode("utf-8"))

    def _global(self, _: Any) -> None:
        module, name = (self._stream.readline().decode("utf-8") for _ in range(2))
        if not module.endswith("\n") or not name.endswith("\n"):
            raise ValueError("a name that does not end")
        self._refer(module[:-1], name[:-1])

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("STACK_GLOBAL of what is not a name")
        self._refer(module, name)

    def _refer(self, module: str, name: str) -> None:
        if f"{module} {name}" not in _GLOBALS:
            raise self._refused(f"it refers to {_shown(module)}.{_shown(name)}")
        self._push(_Global(f"{module} {name}"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise ValueError(f"REDUCE of {_kind(function)} and {_kind(arguments)}")
        if function.name == _DICT and len(arguments) < 2:
            self._push({})
            for pair in self._pairs(*arguments):
                self._set(list(pair))
        elif function.name == _SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
            self._push(arguments[0])
        elif function.name in _TENSORS or function.name in _PARAMETERS:
            self._push(_Called(function.name, arguments))
        else:
            raise self._refused(f"it calls {function.name.replace(' ', '.')} with {len(arguments)} arguments")

    def _pairs(self, pairs: Any = ()) -> Any:
        """Items of a dict as Python 2 wrote it. Each counts, as one list can serve for many dicts."""
        if type(pairs) not in (list, tuple) or not all(
            type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
        ):
            raise ValueError(f"an OrderedDict of {_kind(pairs)}")
        self._count(len(pairs))
        return pairs

    def _build(self, _: Any) -> None:
        """The attributes of an OrderedDict, such as a state dict's _metadata, are dropped."""
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is not dict or type(state) is not dict:
            raise self._refused(f"it gives {_kind(value)} a state that is {_kind(state)}")

    def _persistent(self, _: Any) -> None:
        """("storage", class, key, location, number of elements), and before 1.6 also None, or of a part of the storage
        (key of the part, first element, number of elements).
        """
        found = self._stack.pop()
        if type(found) is not tuple or len(found) not in (5, 6) or type(found[0]) is not str or found[0] != "storage":
            raise self._refused(f"it has {_kind(found)} in place of a storage's description")
        kind, key, location, count = found[1:5]
        if (
            type(kind) is not _Global
            or kind.name not in _STORAGES
            or type(key) is not str
            or type(location) is not str
            or not _naturals((count,))
        ):
            raise ValueError("the description of a storage is not its class, key, location and number of elements")
        storage = _Storage(key, _STORAGES[kind.name], count, 0, count)
        known = self._storages.setdefault(key, storage)
        if known != storage:
            raise ValueError(
                f"storage {key!r} is of {known.total} torch.{known.dtype}, and again of {count} torch.{storage.dtype}"
            )
        self._push(storage if len(found) == 5 or found[5] is None else self._part(storage, found[5]))

    def _part(self, storage: _Storage, part: Any) -> _Storage:
        if type(part) is not tuple or len(part) != 3 or type(part[0]) is not str or not _naturals(part[1:]):
            raise ValueError("the part of a storage is not a key, the first element and the number of elements")
        first, length = part[1:]
        if first + length > storage.total:
            raise ValueError(
                f"part of storage {storage.key!r}: it ends at {first + length} of {storage.total} elements"
            )
        return storage._replace(first=first, length=length)


def _views(path: str, top: Any) -> list[_View]:
    """The tensors of the dict that a pickle builds. Raises CheckpointError where it is anything else."""
    if type(top) is not dict:
        raise CheckpointError(f"{path}: not plain weights: it holds {_kind(top)}, not a dict of tensors; {FIX}")
    views = []
    for name, value in top.items():
        if name is None:
            raise CheckpointError(f"{path}: not plain weights: a dict with a key that is not a string; {FIX}")
        if type(value) is not _Called:
            raise CheckpointError(
                f"{path}: not plain weights: entry {name!r} is {_kind(value)}, where a tensor is expected; {FIX}"
            )
        if name == "__metadata__" or not is_unicode(name):
            raise CheckpointError(f"{path}: tensor {name!r} has a name that safetensors cannot hold")
        views.append(_view(path, name, value))
    return views


def _bare(path: str, name: str, called: _Called) -> _Called:
    """The call that builds the tensor, be it a parameter's."""
    function, arguments = called
    if function in _PARAMETERS:
        if (
            len(arguments) != _PARAMETERS[function]
            or type(arguments[0]) is not _Called
            or type(arguments[1]) is not bool
            or not _none(arguments[2])
        ):
            raise _wrong(path, name, "a parameter not made of a tensor, whether it takes gradients, and no hooks")
        function, arguments = arguments[0]
    if function not in _TENSORS or len(arguments) not in _TENSORS[function]:
        raise _wrong(path, name, f"{len(arguments)} arguments of {function.replace(' ', '.')}, not those of a tensor")
    return _Called(function, arguments)


def _view(path: str, name: str, called: _Called) -> _View:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks[, metadata]), or _v3(the same
    with the dtype before the metadata, on a storage of bytes). The metadata say whether to conjugate or to negate.
    """
    function, arguments = _bare(path, name, called)
    storage, offset, shape, strides, gradient, hooks = arguments[:6]
    if type(storage) is not _Storage or type(gradient) is not bool:
        raise _wrong(path, name, "it is not made of a storage, its place in it, and whether it takes gradients")
    if not _none(hooks):
        raise _wrong(path, name, f"it has hooks, {_kind(hooks)}, but nothing in a checkpoint is run; {FIX}")
    dtype, bits = storage.dtype, arguments[6:]
    if max(_TENSORS[function]) == 8:
        dtype, bits = _DTYPES.get(bits[0].name, "") if type(bits[0]) is _Global else "", bits[1:]
    if bits and not _none(bits[0]):
        raise _wrong(path, name, f"it is conjugated or negated as it is read, which is not supported; {FIX}")
    if dtype not in FROM_TORCH:
        raise _wrong(path, name, f"dtype {f'torch.{dtype}' if dtype else 'unknown'} is none of {', '.join(FROM_TORCH)}")
    if not _naturals((offset,)) or not _naturals(shape) or not _naturals(strides) or len(shape) != len(strides):
        raise _wrong(
            path, name, "offset, shape and strides are not whole numbers from 0 to 2^63 - 1, as many strides as dims"
        )
    if len(shape) > MAX_DIMS:
        raise _wrong(path, name, f"{len(shape)} dimensions, but at most {MAX_DIMS} are read")
    return _View(name, dtype, storage, offset, shape, strides)


def _naturals(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _none(values: Any) -> bool:
    return values is None or (type(values) is dict and not values)


def _shown(text: str) -> str:
    return repr(text[:200])[1:-1]


def _kind(value: Any) -> str:
    """What a value is, in words; its content may be of any size."""
    if type(value) is _Called:
        return "a tensor"
    if type(value) is _Global:
        return value.name.replace(" ", ".")
    if type(value) is _Storage:
        return "a storage"
    if value is None:
        return "None"
    return f"{'an' if type(value) is int else 'a'} {type(value).__name__}"


# Elements that do not lie one after another


class Gathered:
    """A tensor whose elements are spread over a file, read as if they lay in it one after another."""

    def __init__(self, reader: FileReader, start: int, dims: tuple[tuple[int, int], ...], item: int) -> None:
        """start: the first element's byte. dims: lengths, and strides in elements. item: bytes of an element."""
        self._reader, self._start, self._item = reader, start, item
        self._shape = tuple(length for length, _ in dims)
        self._strides = tuple(stride for _, stride in dims)

    def read(self, start: int, into: Any) -> None:
        """Fill a buffer with the tensor's bytes from `start` on. Raises CheckpointError."""
        import numpy as np

        memory, item = memoryview(into).cast("B"), self._item
        stop = start + len(memory)
        first, last = -(-start // item), stop // item  # of the elements that are wanted whole
        if start % item:
            part = self._element(start // item)[start % item : start % item + len(memory)]
            memory[: len(part)] = part
        if stop % item and last >= first:
            memory[len(memory) - stop % item :] = self._element(last)[: stop % item]
        at = first * item - start
        for base, depth, length in self._boxes(0, first, last, 0):
            shape = (length, *self._shape[depth + 1 :])[: len(self._shape) - depth]
            nbytes = element_count(shape) * item
            out = np.frombuffer(memory[at : at + nbytes], f"u{item}").reshape(shape)
            order = sorted(range(len(shape)), key=lambda dim, depth=depth: -self._strides[depth + dim])  # type: ignore[misc]
            self._fill(out.transpose(order), base, [self._strides[depth + dim] for dim in order])
            at += nbytes

    @contextlib.contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """None: only `read` will do."""
        yield None

    def ahead(self, start: int, stop: int) -> None:
        """Nothing: the bytes are all over the file."""

    def _element(self, number: int) -> bytearray:
        base = 0
        for length, stride in zip(reversed(self._shape), reversed(self._strides), strict=True):
            number, index = divmod(number, length)
            base += index * stride
        found = bytearray(self._item)
        self._reader.read(self._start + base * self._item, found)
        return found

    def _boxes(self, dim: int, first: int, stop: int, base: int) -> Iterator[tuple[int, int, int]]:
        """What elements [first, stop) from `base` on, in C order over the dimensions from `dim` on, consist of.

        Each is (its first element, a dimension, a length): so many along this dimension, all of those after it.
        """
        if first >= stop:
            return
        if dim == len(self._shape):
            yield base, dim, 1
            return
        row, stride = element_count(self._shape[dim + 1 :]), self._strides[dim]
        begin, end = -(-first // row), stop // row  # whole rows
        if first < begin * row:
            within = (begin - 1) * row
            yield from self._boxes(dim + 1, first - within, min(stop - within, row), base + (begin - 1) * stride)
        if begin < end:
            yield base + begin * stride, dim, end - begin
        if end * row < stop and begin <= end:
            yield from self._boxes(dim + 1, 0, stop - end * row, base + end * stride)

    def _fill(self, out: Any, base: int, strides: Sequence[int]) -> None:
        """out[i, j, ...] = the element at base + i * strides[0] + j * strides[1] + ...; the largest stride is first."""
        import numpy as np

        if not out.ndim:
            out, strides = out.reshape(1), (0,)
        most, wide = SCRATCH // self._item, GAP // self._item
        # Elements from the first one to the last, over the dimensions from each on.
        spans = [1]
        for length, stride in zip(reversed(out.shape), reversed(strides), strict=True):
            spans.insert(0, spans[0] + (length - 1) * stride)
        inner, step = spans[1], strides[0]
        if out.ndim > 1 and (inner > most or any(a - b > wide for a, b in zip(strides[1:], spans[2:], strict=True))):
            for i in range(len(out)):
                self._fill(out[i, ...], base + i * step, strides[1:])
            return
        apart = step - inner > wide  # too far to read what lies between
        few = len(out) if not step else max(1, most // inner if apart else 1 + (most - inner) // step)
        for i in range(0, len(out), few):
            part = out[i : i + few]
            found = np.empty(len(part) * inner if apart else inner + (len(part) - 1) * step, out.dtype)
            for k in range(len(part) if apart else 1):
                piece = found[k * inner : (k + 1) * inner] if apart else found
                self._reader.read(self._start + (base + (i + k) * step) * self._item, piece)
            layout = [stride * self._item for stride in (inner if apart else step, *strides[1:])]
            part[...] = np.ndarray(part.shape, found.dtype, found, strides=layout)
