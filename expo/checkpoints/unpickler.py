"""An unpickler that runs nothing: it reads what a pickle of PyTorch's says about tensors, without torch.

The author of a pickle decides what is run when it is loaded, so no pickle is loaded here. The unpickler carries out the
few instructions that tensors need, and builds descriptions of tensors in place of the tensors. A name in the pickle is
compared with a list and never looked up. Source: github.com/pytorch/pytorch, torch/serialization.py and
torch/storage.py (_dtype_to_storage_type_map).
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..dtypes import BITS, FROM_TORCH
from ..errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_PICKLE = 100_000_000  # most bytes of a pickle, as many as of a safetensors header
MAX_STEPS = 4_000_000  # most instructions of a pickle; a tensor takes some 30
MAX_TEXT = 1 << 16  # most bytes of a string in a pickle
FIX = "save model.state_dict() alone, or load it with transformers and save it with save_pretrained()"

# Bytes of an element of the dtypes that torch has and safetensors lacks.
_OTHERS = {
    "complex32": 4, "complex128": 16, "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "bits8": 1,
    "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "float4_e2m1fn_x2": 1,
}  # fmt: skip
TORCH_ITEMSIZE = {**{torch: BITS[name] // 8 for torch, name in FROM_TORCH.items()}, **_OTHERS}

# A pickle may refer to these, each written "module name": classes of storages, with the dtype of their elements;
# dtypes; and the functions that build a tensor and a parameter, with the numbers of arguments that each takes.
STORAGES = {
    "torch BoolStorage": "bool", "torch ByteStorage": "uint8", "torch CharStorage": "int8",
    "torch ShortStorage": "int16", "torch IntStorage": "int32", "torch LongStorage": "int64",
    "torch HalfStorage": "float16", "torch BFloat16Storage": "bfloat16", "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64", "torch ComplexFloatStorage": "complex64",
    "torch ComplexDoubleStorage": "complex128", "torch QUInt8Storage": "quint8", "torch QInt8Storage": "qint8",
    "torch QInt32Storage": "qint32", "torch QUInt4x2Storage": "quint4x2", "torch QUInt2x4Storage": "quint2x4",
    "torch UntypedStorage": "uint8", "torch.storage UntypedStorage": "uint8",
}  # fmt: skip
DTYPES = {f"torch {name}": name for name in TORCH_ITEMSIZE}
TENSORS = {"torch._utils _rebuild_tensor_v2": (6, 7), "torch._utils _rebuild_tensor_v3": (7, 8)}
PARAMETERS = {"torch._utils _rebuild_parameter": 3, "torch._utils _rebuild_parameter_with_state": 4}
_DICT, _SIZE = "collections OrderedDict", "torch Size"
_GLOBALS = {*STORAGES, *DTYPES, *TENSORS, *PARAMETERS, _DICT, _SIZE}


class Reference(NamedTuple):
    """A class, function or dtype that a pickle refers to, by its name in the lists above."""

    name: str


class Call(NamedTuple):
    """A call of a function, in place of its result."""

    function: str
    arguments: tuple[Any, ...]


class Object:
    """An object of a class that is not looked up, with the values that the pickle gives it.

    Attributes:
        name: The module and the name of the class, or of the function that would make the object.
        arguments: The arguments of that call.
        state: The state that the pickle sets, most often a dict of attributes; None without one.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    state: Any

    def attribute(self, name: str) -> Any:
        """Return an attribute; None if the state is no dict that has it."""
        return self.state.get(name) if type(self.state) is dict else None


class Storage(NamedTuple):
    """Elements [first, first + length) of a storage: a run of bytes that tensors are views of.

    Attributes:
        key: The name of the storage in the file.
        dtype: torch's name for the dtype of its elements.
        total: The number of elements of the whole storage.
        first: The first element of this part.
        length: The number of elements of this part.
    """

    key: str
    dtype: str
    total: int
    first: int
    length: int


class PickleStream:
    """Bytes [start, start + length) of an open file, read in small pieces, each of which updates a digest."""

    def __init__(self, file: BinaryIO, start: int, length: int, digest: _Hash) -> None:
        file.seek(start)
        self._file, self._length, self._digest = file, length, digest
        self.position = 0

    def read(self, count: int) -> bytes:
        """Return at most `count` bytes. Raises ValueError for a `count` over MAX_TEXT, and at the end."""
        if count > MAX_TEXT:
            raise ValueError(f"a string of {count} bytes, but at most {MAX_TEXT} are read")
        return self._read(count, self._file.read)

    def readline(self) -> bytes:
        """Return a line, or its beginning if it is too long. Raises ValueError at the end."""
        return self._read(MAX_TEXT, self._file.readline)

    def _read(self, count: int, read: Callable[[int], bytes]) -> bytes:
        piece = read(min(count, self._length - self.position))
        if count and not piece:
            raise ValueError(f"no end within {self._length} bytes")
        self.position += len(piece)
        self._digest.update(piece)
        return piece


# These instructions put the value that follows them on the stack.
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class Unpickler:
    """Carries out the instructions of one pickle, with descriptions in place of tensors, storages and functions.

    Only strings among these values are ever hashed or compared, and no value is walked through: a pickle can nest
    values a million deep, or make a few that are larger than any memory once they are written out. For all keys that
    are not strings, a dict here has the one key None; with objects, its value is the list of these (key, value).
    """

    def __init__(self, path: str, stream: PickleStream, storages: dict[str, Storage], objects: bool = False) -> None:
        """Prepare to run the pickle that begins at the stream's position.

        Args:
            path: The file, for messages.
            stream: The bytes of the pickle.
            storages: A dict, to which `run` adds the storages that the pickle names, by their keys.
            objects: True to build an `Object` for each call or class that is in none of the lists; False to refuse it.
        """
        self._objects, self._most_steps = objects, MAX_STEPS * (10 if objects else 1)
        self._path, self._stream, self._storages = path, stream, storages
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack before each mark
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
        if objects:
            self._instructions["NEWOBJ"] = self._new_object

    def run(self) -> Any:
        """Return the value that the pickle builds. Raises CheckpointError, and OSError."""
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
        """Carry out one instruction. Raises CheckpointError for one that no tensor needs."""
        name, stream = opcode.name, self._stream
        if name in _CONSTANTS:
            self._push(_CONSTANTS[name])
            return
        if name not in _LITERALS and name not in self._instructions:
            raise self._refused(f"its pickle has the instruction {name}")
        # pickletools would warn about backslashes in the two lines after a GLOBAL.
        argument = opcode.arg.reader(stream) if opcode.arg and name != "GLOBAL" else None  # type: ignore[arg-type]
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > 127:
                raise ValueError(f"a number of {argument.bit_length()} bits")
            self._push(argument)
        else:
            self._instructions[name](argument)

    def _count(self, steps: int) -> None:
        """Count steps of work. Raises CheckpointError if there are too many."""
        self._steps += steps
        if self._steps > self._most_steps:
            raise CheckpointError(
                f"{self._path}: a pickle of over {self._most_steps} instructions; not plain weights? {FIX}"
            )

    def _refused(self, what: str) -> CheckpointError:
        """Return the error about a pickle that has more than tensors."""
        return CheckpointError(f"{self._path}: {what}, which is not plain weights; nothing in it was run; {FIX}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        """Put the stack aside, and begin an empty one for the values after the mark."""
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        """Return the values since the last mark, and go back to the stack before it."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def _tuple(self, length: int) -> None:
        """Replace the last `length` values by a tuple of them."""
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
        """Set items of the dict on top of the stack: key, value, key, value, and so on."""
        into = self._stack[-1]
        if type(into) is not dict or len(items) % 2:
            raise ValueError("SETITEM of what is not a dict, or of half an item")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str and key in into:
                raise ValueError(f"{key!r} occurs twice in a dict")
            if type(key) is not str and self._objects:
                into.setdefault(None, []).append((key, value))
            else:
                into[key if type(key) is str else None] = value

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _get(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError(f"it reads value {number} of its memo, which does not exist")
        self._push(self._memo[number])

    def _string(self, text: str) -> None:
        """Push a string as Python 2 wrote it; pickletools makes a character of each byte."""
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
        """Push a reference. Raises CheckpointError for a name that is in none of the lists."""
        if f"{module} {name}" not in _GLOBALS and not self._objects:
            raise self._refused(f"it refers to {_shown(module)}.{_shown(name)}")
        self._push(Reference(f"{module} {name}"))

    def _reduce(self, _: Any) -> None:
        """Push the description of a call, or the dict or tuple that it returns."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Reference or type(arguments) is not tuple:
            raise ValueError(f"REDUCE of {kind_of(function)} and {kind_of(arguments)}")
        if function.name == _DICT and len(arguments) < 2:
            self._push({})
            for pair in self._pairs(*arguments):
                self._set(list(pair))
        elif function.name == _SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
            self._push(arguments[0])
        elif function.name in TENSORS or function.name in PARAMETERS:
            self._push(Call(function.name, arguments))
        elif self._objects:
            self._push(Object(function.name, arguments))
        else:
            raise self._refused(f"it calls {function.name.replace(' ', '.')} with {len(arguments)} arguments")

    def _pairs(self, pairs: Any = ()) -> Any:
        """Return the items of a dict as Python 2 wrote it. Each counts as a step: one list can serve for many dicts."""
        if type(pairs) not in (list, tuple) or not all(
            type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
        ):
            raise ValueError(f"an OrderedDict of {kind_of(pairs)}")
        self._count(len(pairs))
        return pairs

    def _new_object(self, _: Any) -> None:
        """Push an object of a class."""
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is not Reference or type(arguments) is not tuple:
            raise ValueError(f"NEWOBJ of {kind_of(kind)} and {kind_of(arguments)}")
        self._push(Object(kind.name, arguments))

    def _build(self, _: Any) -> None:
        """Set the state of an object; drop the attributes of an OrderedDict, such as a state dict's _metadata."""
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is Object:
            value.state = state
            return
        if type(value) is not dict or type(state) is not dict:
            raise self._refused(f"it gives {kind_of(value)} a state that is {kind_of(state)}")

    def _persistent(self, _: Any) -> None:
        """Push the storage that a tuple describes: "storage", class, key, location, number of elements.

        Before torch 1.6 the tuple has one item more: None, or a part of the storage as a tuple of the part's key, its
        first element and its number of elements.
        """
        found = self._stack.pop()
        if type(found) is not tuple or len(found) not in (5, 6) or type(found[0]) is not str or found[0] != "storage":
            raise self._refused(f"it has {kind_of(found)} in place of a storage's description")
        kind, key, location, count = found[1:5]
        if (
            type(kind) is not Reference
            or kind.name not in STORAGES
            or type(key) is not str
            or type(location) is not str
            or not are_naturals((count,))
        ):
            raise ValueError("the description of a storage is not its class, key, location and number of elements")
        storage = Storage(key, STORAGES[kind.name], count, 0, count)
        known = self._storages.setdefault(key, storage)
        if known != storage:
            raise ValueError(
                f"storage {key!r} is of {known.total} torch.{known.dtype}, and again of {count} torch.{storage.dtype}"
            )
        self._push(storage if len(found) == 5 or found[5] is None else self._part(storage, found[5]))

    def _part(self, storage: Storage, part: Any) -> Storage:
        """Return a part of a storage."""
        if type(part) is not tuple or len(part) != 3 or type(part[0]) is not str or not are_naturals(part[1:]):
            raise ValueError("the part of a storage is not a key, the first element and the number of elements")
        first, length = part[1:]
        if first + length > storage.total:
            raise ValueError(
                f"part of storage {storage.key!r}: it ends at {first + length} of {storage.total} elements"
            )
        return storage._replace(first=first, length=length)


def are_naturals(values: Any) -> bool:
    """Return True for a tuple of whole numbers from 0 to 2^63 - 1."""
    return type(values) is tuple and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _shown(text: str) -> str:
    """Return the beginning of a text, with escapes and without quotes."""
    return repr(text[:200])[1:-1]


def kind_of(value: Any) -> str:
    """Return the kind of a value in words, without its content, which may be of any size."""
    if type(value) is Call:
        return "a tensor"
    if type(value) is Reference:
        return value.name.replace(" ", ".")
    if type(value) is Storage:
        return "a storage"
    if type(value) is Object:
        return value.name.replace(" ", ".")
    if value is None:
        return "None"
    return f"{'an' if type(value) is int else 'a'} {type(value).__name__}"
