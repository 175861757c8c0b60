"""Run Triton's PTX on a CPU, with the rounding, reductions and barriers that the LLVM IR before it does not show.

A register is an array of shape (programs, threads), so that an instruction is one NumPy operation for many programs.
The interpreter refuses every opcode, modifier or operand that it does not know exactly (`Refused`). It raises a `Fault`
for operations that a GPU traps on or whose result is not defined: an access outside the buffers, or an access to shared
memory without a barrier. It does not find races in global memory.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Compute = Callable[..., Array]
STORED: dict[int, Any] = {
    1: np.bool_,
    8: np.uint8,
    16: np.uint16,
    32: np.uint32,
    64: np.uint64,
}  # the dtype of a register, by its width in bits
TYPES: dict[str, tuple[int, Any]] = {
    **{"pred": (1, np.bool_), "f16": (16, np.float16), "f32": (32, np.float32)},
    **{
        "f16x2": (32, np.float16),
        "f32x2": (64, np.float32),
    },  # a register holds two numbers, so its view has twice the columns
    **{f"{kind}{bits}": (bits, STORED[bits]) for kind in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": (bits, np.dtype(f"i{bits // 8}").type) for bits in (16, 32, 64)},
}
ACCESS = re.compile(r"(ld|st)\.(global|shared)(?:(?<=shared)::cta)?(?:\.v([24]))?\.b(8|16|32|64)")
MATRICES = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
WARP, EVERY_LANE = 32, 0xFFFFFFFF
POISON = 0xA5A5  # a finite number in fp32, so that a result from unwritten memory is wrong and not NaN
WINDOW = 1024  # the address of shared memory: not 0, so that an access without the base fails
PAGE = 1 << 32  # bytes between buffers, so that an access past one does not reach the next


class Refused(Exception):
    """An error for PTX that this interpreter does not know."""


class Fault(Exception):
    """An error for an operation that a GPU traps on, or whose result is not defined."""


# Arithmetic


def canonical(compute: Compute) -> Compute:
    """Replace each NaN by 0x7fffffff, the NaN of NVIDIA's fp32 operations, which integer rounding turns into -0."""

    def computed(*operands: Array) -> Array:
        result = compute(*operands)
        if (nan := result != result).any():
            result.view(np.uint32)[nan] = 0x7FFFFFFF
        return result

    return computed


def fused(x: Array, y: Array, z: Array) -> Array:
    """Return x * y + z of fp32, rounded once.

    The product is exact in a double, and the sum is rounded to odd there: its error, by Knuth's two-sum, sets the last
    bit. So the second rounding, to less than half as many bits, does not take the sum for a tie.
    """
    p, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = p + z
    part = total - p
    error = (p - (total - part)) + (z - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def to_bf16(x: Array) -> Array:
    """Return the bits, rounded to nearest even; NVIDIA's NaN is 0x7fff."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint16(0x7FFF), near.astype(np.uint16))


def to_fp16(x: Array) -> Array:
    """Return the bits, rounded to nearest even; NVIDIA's NaN is 0x7fff."""
    return np.where(x != x, np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def pair(narrow: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Return a conversion of two operands into one register, the first of them into the upper half."""
    return lambda high, low: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)


def largest(x: Array, *more: Array) -> Array:
    """Compute max.f32, which is NaN only if all operands are NaN, and for which +0 is above -0."""
    for y in more:
        equal = (x.view(np.uint32) & y.view(np.uint32)).view(np.float32)
        x = np.where(x == y, equal, np.where((x > y) | (y != y), x, y))
    return x


def smallest(x: Array, *more: Array) -> Array:
    """Compute min.f32."""
    return -largest(-x, *(-y for y in more))


def with_nan(choose: Compute) -> Compute:
    """Return the .NaN form of an operation, which is NaN if any operand is NaN."""
    return lambda *xs: np.where(np.any([x != x for x in xs], 0), np.float32(np.nan), choose(*xs))


def comparisons(kind: str) -> dict[str, Compute]:
    """Return setp's comparisons. With a NaN the float ones are false, and those whose names end in u are true."""
    if kind[0] == "b":
        return {"eq": np.equal, "ne": np.not_equal}
    known: dict[str, Compute] = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    known["eq"] = np.equal
    if kind[0] != "f":
        return {**known, "ne": np.not_equal}
    known["ne"] = lambda x, y: (x < y) | (x > y)
    known["num"] = lambda x, y: (x == x) & (y == y)
    opposite = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "equ": "ne", "neu": "eq", "nan": "num"}
    return {**known, **{name: lambda x, y, of=known[of]: ~of(x, y) for name, of in opposite.items()}}


def shifted(shift: Any) -> Compute:
    """Return a shift. An amount past the width gives zeros or the sign, in PTX as in NumPy."""
    return lambda x, amount: shift(x, np.minimum(amount, 64).astype(x.dtype))


def of_floats() -> Iterator[tuple[str, str, Compute]]:
    """Yield the opcode, the types of the result and the operands, and the function of each operation."""
    operations: dict[str, Compute] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fused}
    for name, compute in operations.items():
        for kind in ("f32", "f32x2"):
            yield f"{name}.rn.{kind}", f"{kind} " * (4 if name == "fma" else 3), canonical(compute)
        if name in ("add", "sub"):
            mixed = canonical(lambda x, y, compute=compute: compute(x.astype(np.float32), y))
            yield f"{name}.rn.f32.f16", "f32 f16 f32", mixed
    for name, choose in {"max": largest, "min": smallest}.items():
        for types in ("f32 " * 3, "f32 " * 4):
            yield f"{name}.f32", types, canonical(choose)
            yield f"{name}.NaN.f32", types, canonical(with_nan(choose))
    yield "abs.f32", "f32 f32", canonical(np.abs)
    yield "neg.f32", "f32 f32", canonical(np.negative)
    yield "abs.f16", "f16 f16", np.abs
    yield "abs.f16x2", "f16x2 f16x2", np.abs
    yield "cvt.f32.f16", "f32 f16", canonical(lambda x: x.astype(np.float32))
    for kind, narrow in {"bf16": to_bf16, "f16": to_fp16}.items():
        yield f"cvt.rn.{kind}.f32", "b16 f32", narrow
        yield f"cvt.rn.{kind}x2.f32", "b32 f32 f32", pair(narrow)


def multiply_add(x: Array, y: Array, z: Array) -> Array:
    return x * y + z


def quotient(x: Array, y: Array) -> Array:
    """Return x / y, rounded towards zero. Raises Fault for a division by zero, whose result PTX leaves open."""
    if (y == 0).any():
        raise Fault("a division by zero")
    return (x - np.fmod(x, y)) // y


def of_integers() -> Iterator[tuple[str, str, Compute]]:
    for to, source in (("u64", "u32"), ("u32", "u64"), ("s64", "s32"), ("u32", "u16"), ("u16", "u32"), ("u64", "u16")):
        yield f"cvt.{to}.{source}", f"{to} {source}", lambda x, to=to: x.astype(TYPES[to][1])
    for kind in ("u16", "u32", "s32"):
        yield f"cvt.rn.f32.{kind}", f"f32 {kind}", lambda x: x.astype(np.float32)
    for kind in ("s32", "s64"):
        yield f"neg.{kind}", f"{kind} " * 2, np.negative
        yield f"add.{kind}", f"{kind} " * 3, np.add
        yield f"sub.{kind}", f"{kind} " * 3, np.subtract
        yield f"mul.lo.{kind}", f"{kind} " * 3, np.multiply
        yield f"mad.lo.{kind}", f"{kind} " * 4, multiply_add
        yield f"div.{kind}", f"{kind} " * 3, quotient
        yield f"rem.{kind}", f"{kind} " * 3, np.fmod
    for kind, wide in (("u32", "u64"), ("s32", "s64")):
        to = TYPES[wide][1]
        yield f"mul.wide.{kind}", f"{wide} {kind} {kind}", lambda x, y, to=to: x.astype(to) * y.astype(to)
        types = f"{wide} {kind} {kind} {wide}"
        yield f"mad.wide.{kind}", types, lambda x, y, z, to=to: multiply_add(x.astype(to), y.astype(to), z)
    logic: dict[str, Compute] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    for (name, compute), kind in product(logic.items(), ("pred", "b16", "b32", "b64")):
        yield f"{name}.{kind}", f"{kind} " * 3, compute
    for width in (16, 32, 64):
        yield f"shl.b{width}", f"b{width} b{width} u32", shifted(np.left_shift)
        for kind in (f"u{width}", f"s{width}"):
            yield f"shr.{kind}", f"{kind} {kind} u32", shifted(np.right_shift)


def selected(x: Array, y: Array, first: Array) -> Array:
    return np.where(first, x, y)


def of_any() -> Iterator[tuple[str, str, Compute]]:
    for kind in TYPES.keys() - {"pred", "f16x2", "f32x2"}:
        yield f"selp.{kind}", f"{kind} {kind} {kind} pred", selected
        for name, compare in comparisons(kind).items():
            yield f"setp.{name}.{kind}", f"pred {kind} {kind}", compare
            for word, join in (("and", np.logical_and), ("or", np.logical_or)):
                joined = lambda x, y, p, compare=compare, join=join: join(compare(x, y), p)  # noqa: E731
                yield f"setp.{name}.{word}.{kind}", f"pred {kind} {kind} pred", joined


def over_warp(join: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    """Return a reduction that joins the lanes, the last axis, in pairs."""

    def reduced(lanes: Array) -> Array:
        while lanes.shape[-1] > 1:
            lanes = join(*np.split(lanes, 2, -1))
        return lanes

    return reduced


# The instructions from registers to a register, by opcode and number of operands.
FORMS = {
    (opcode, len(types.split())): (types.split(), compute)
    for opcode, types, compute in chain(of_floats(), of_integers(), of_any())
}
SHUFFLES = {str(bit): lambda lanes, bit=bit: lanes[..., np.arange(WARP) ^ bit] for bit in (1, 2, 4, 8, 16)}
REDUCTIONS = {
    "redux.sync.add.s32": ("s32", over_warp(np.add)),
    "redux.sync.max.f32": ("f32", over_warp(canonical(largest))),
}


# Memory


class Access(NamedTuple):
    """The lanes that access memory, by row, program and thread; each accesses `words` words of `width` bits."""

    row: Array
    program: Array
    thread: Array
    address: Array
    width: int
    words: int

    @property
    def size(self) -> int:
        return self.width // 8 * self.words

    def require(self, good: Array, what: str) -> None:
        """Raise a Fault that names the first lane for which `good` is False."""
        if not good.all():
            i = int(np.flatnonzero(~good)[0])
            raise Fault(f"{what}: {self.address[i]:#x}, by program {self.program[i]}, thread {self.thread[i]}")


class Buffer(NamedTuple):
    start: int
    size: int
    writable: bool
    memory: Array  # the bytes from `base` on
    base: int  # a multiple of 16: the page's address, or at most 15 bytes before the start


class Memory:
    """Global memory: arrays, each on a page of its own, and memory of this process at its own addresses."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []

    def place(self, data: Array, writable: bool = False, shift: int = 0) -> int:
        """Copy the data to `shift` bytes past the start of a page, and return the address."""
        page = (len(self._buffers) + 1) * PAGE
        memory = np.zeros((shift + data.nbytes + 15) // 16 * 16, np.uint8)
        memory[shift : shift + data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._buffers.append(Buffer(page + shift, data.nbytes, writable, memory, page))
        return page + shift

    def map(self, address: int, size: int, writable: bool) -> None:
        """Give access to the process's own memory, without a copy."""
        base, stop = address // 16 * 16, -(-(address + size) // 16) * 16
        if size:
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * (stop - base)).from_address(base))
            self._buffers.append(Buffer(address, size, writable, memory, base))

    def read(self, address: int, dtype: Any) -> Array:
        """Return the elements of the buffer that starts at this address."""
        (buffer,) = (buffer for buffer in self._buffers if buffer.start == address)
        return buffer.memory[address - buffer.base :][: buffer.size].view(dtype)

    def _each(self, access: Access, writing: bool) -> Iterator[tuple[Array, Array, Array]]:
        """Yield each accessed buffer's memory in units of the access, the lanes that access it, and their units."""
        access.require(access.address % access.size == 0, "misaligned")
        outside = np.ones(len(access.address), bool)
        for start, size, writable, memory, base in self._buffers:
            if size >= access.size and writable >= writing:
                inside = access.address - np.uint64(start) <= np.uint64(size - access.size)
                if inside.any():
                    units = memory.view(STORED[access.width]).reshape(-1, access.words)
                    yield units, inside, ((access.address[inside] - np.uint64(base)) // access.size).astype(np.int64)
                outside &= ~inside
        access.require(~outside, "a write outside the writable buffers" if writing else "a read outside the buffers")

    def load(self, access: Access) -> Array:
        words = np.zeros((len(access.address), access.words), STORED[access.width])
        for units, lanes, at in self._each(access, False):
            words[lanes] = units[at]
        return words

    def store(self, access: Access, words: Array) -> None:
        for units, lanes, at in self._each(access, True):
            units[at] = words[lanes]


class Shared:
    """Shared memory in words. Each word has a bit for every warp that has read or written it since the last barrier."""

    CELL = np.dtype([("word", np.uint32), ("known", np.bool_), ("readers", np.uint32), ("writers", np.uint32)])

    def __init__(self, cells: Array) -> None:
        self.cells = cells  # of shape (programs, words)

    def barrier(self) -> None:
        self.cells["readers"] = self.cells["writers"] = 0

    def _touched(self, access: Access) -> tuple[Any, Array]:
        """Return the indices of the words, and the bits of the lanes' warps."""
        access.require(access.address % access.size == 0, "misaligned in shared memory")
        first = (access.address.astype(np.int64) - WINDOW) // 4
        access.require((first >= 0) & (first + access.words <= self.cells.shape[1]), "outside shared memory")
        at = first[:, None] + np.arange(access.words)
        warp = np.uint32(1) << (access.thread // WARP).astype(np.uint32)
        return (access.row[:, None], at), np.broadcast_to(warp[:, None], at.shape)

    def load(self, access: Access) -> Array:
        at, warp = self._touched(access)
        cells = self.cells[at]
        access.require(cells["known"].all(1), "a read of shared memory that nothing wrote")
        access.require((cells["writers"] & ~warp == 0).all(1), "no barrier after another warp's write")
        np.bitwise_or.at(self.cells["readers"], at, warp)
        words: Array = cells["word"]
        return words

    def store(self, access: Access, words: Array) -> None:
        at, warp = self._touched(access)
        np.bitwise_or.at(self.cells["writers"], at, warp)
        cells = self.cells[at]
        others = (cells["readers"] | cells["writers"]) & ~warp
        access.require((others == 0).all(1), "no barrier between two warps' accesses")
        self.cells["word"][at], self.cells["known"][at] = words, True


# Programs


class Group:
    """Programs that run the same instruction next."""

    def __init__(self, programs: Array, threads: int, arguments: dict[str, Array], memory: Memory, cells: Array):
        self.programs, self.shape = programs, (len(programs), threads)
        self.arguments, self.memory, self.shared = arguments, memory, Shared(cells)
        self.registers: dict[str, Array] = {}
        self.at = 0

    def read(self, name: str) -> Array:
        if name not in self.registers:
            raise Fault(f"{name} is read before it is written")
        return self.registers[name]

    def write(self, name: str, value: Array, where: Array | None) -> None:
        if where is not None:
            value = np.where(where, value, self.read(name))
        if value.shape != self.shape:
            value = np.broadcast_to(value, self.shape)
        self.registers[name] = np.ascontiguousarray(value)

    def only(self, rows: Array, at: int) -> Group:
        """Return the group of these programs at another instruction."""
        part = Group(self.programs[rows], self.shape[1], self.arguments, self.memory, self.shared.cells[rows])
        part.registers = {name: value[rows] for name, value in self.registers.items()}
        part.at = at
        return part

    def access(self, address: Array, where: Array | None, width: int, count: int) -> Access:
        row, thread = np.nonzero(np.ones(self.shape, bool) if where is None else where)
        return Access(row, self.programs[row], thread, address[row, thread], width, count)


Act = Callable[[Group, "Array | None"], None]  # the second argument has the active lanes, or None for all
Source = Callable[[Group], Array]
SPECIAL: dict[str, Source] = {
    "%tid.x": lambda group: np.arange(group.shape[1], dtype=np.uint32)[None],
    "%ctaid.x": lambda group: group.programs[:, None],
    "global_smem": lambda group: np.array([[WINDOW]], np.uint32),
}


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        text: The text in the PTX.
        guard: The register of the predicate; "" if there is none.
        wanted: The value of the predicate in the lanes that run the instruction.
        act: The operation; None for a branch or a return.
        label: The target of a branch; "" for other instructions.
    """

    text: str
    guard: str
    wanted: bool
    act: Act | None
    label: str = ""


class Kernel:
    """The only entry of a PTX text, with `shared` bytes of dynamic shared memory."""

    def __init__(self, text: str, shared: int = 0) -> None:
        text = re.sub(r"//.*", "", text)
        found = re.search(r"\.visible \.entry \w+\(([^)]*)\)\s*\.reqntid (\d+)\s*\{\n(.*?)\n\}", text, re.DOTALL)
        if found is None or len(re.findall(r"\.(?:entry|func)\b", text)) != 1:
            raise Refused("not one entry with a fixed number of threads")
        header = r"\s*(\.(version|target|address_size) .*|\.extern \.shared \.align 16 \.b8 global_smem\[\];)?\s*"
        if unknown := [line for line in text[: found.start()].splitlines() if not re.fullmatch(header, line)]:
            raise Refused(unknown[0])
        self.shared, self.threads = shared, int(found[2])
        self.parameters = dict(self._declared(line) for line in found[1].split(","))
        self.banks: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for line in found[3].splitlines():
            self._line(line.strip())
        if missing := {step.label for step in self.instructions if step.label} - self.labels.keys():
            raise Refused(f"no labels {missing}")

    def run(
        self, programs: Sequence[int] | Array, arguments: Sequence[Any], memory: Memory, together: int = 64
    ) -> None:
        """Run the programs in this order, `together` at a time; their results are in the memory afterwards."""
        values = {
            name: np.array([[value]], TYPES[kind][1]).view(STORED[TYPES[kind][0]])
            for (name, kind), value in zip(self.parameters.items(), arguments, strict=True)
        }
        programs = np.asarray(programs, np.uint32)
        with np.errstate(all="ignore"):
            for i in range(0, len(programs), together):
                some = programs[i : i + together]
                cells = np.zeros((len(some), self.shared // 4), Shared.CELL)
                waiting = [Group(some, self.threads, values, memory, cells)]
                while waiting:
                    waiting += self._advance(waiting.pop())

    def _advance(self, group: Group) -> list[Group]:
        """Run until all programs end, or return the groups of programs that diverge at a branch."""
        while group.at < len(self.instructions):
            step = self.instructions[group.at]
            where = group.read(step.guard) == step.wanted if step.guard else None
            group.at += 1
            if step.act is not None:
                step.act(group, where)
            elif not step.label:
                return []
            elif where is None or where.all():
                group.at = self.labels[step.label]
            elif where.any():
                taken = where.all(1)
                if (taken != where.any(1)).any():
                    raise Fault(f"threads of a program diverge at {step.text}")
                return [group.only(taken, self.labels[step.label]), group.only(~taken, group.at)]
        raise Fault("the end is reached without ret")

    # Parsing: each of these methods understands a part of the text completely, or raises Refused.

    def _declared(self, line: str) -> tuple[str, str]:
        """Return a parameter's name and type."""
        found = re.fullmatch(r"\s*\.param \.(u64|u32|f32)(?: \.ptr \.global \.align \d+)? (\w+)\s*", line)
        if found is None:
            raise Refused(line)
        return found[2], found[1]

    def _line(self, line: str) -> None:
        if not line or re.fullmatch(r"\.loc\t\d+ .*", line):
            return
        if label := re.fullmatch(r"(\$\w+):", line):
            self.labels[label[1]] = len(self.instructions)
        elif bank := re.fullmatch(r"\.reg \.(pred|b16|b32|b64) \t(%[a-z]+)<(\d+)>;", line):
            self.banks[bank[2]] = (TYPES[bank[1]][0], int(bank[3]))
        else:
            *statements, rest = line.split(";")
            if rest.strip():
                raise Refused(line)
            self.instructions += [self._instruction(text.strip()) for text in statements]

    def _instruction(self, text: str) -> Instruction:
        operand = r"(?:\{[^{}]*\}|\[[^\[\]]*\]|[^\s,{}\[\]]+)"
        found = re.fullmatch(rf"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)(?:\s+({operand}(?:\s*,\s*{operand})*))?", text)
        if found is None:
            raise Refused(text)
        guard, wanted, opcode, operands = found[2] or "", not found[1], found[3], re.findall(operand, found[4] or "")
        try:
            if guard:
                self._register(guard, 1)
            if (opcode == "bra" or (opcode == "bra.uni" and not guard)) and len(operands) == 1:
                return Instruction(text, guard, wanted, None, operands[0])
            if text == "ret":
                return Instruction(text, guard, wanted, None)
            return Instruction(text, guard, wanted, self._act(opcode, operands, bool(guard)))
        except Refused as error:
            raise Refused(f"{text}: {error}") from None

    def _act(self, opcode: str, operands: list[str], guarded: bool) -> Act:
        if (opcode, len(operands)) in FORMS:
            return self._computed(operands, *FORMS[opcode, len(operands)])
        if len(operands) == 2:
            if found := re.fullmatch(r"mov\.[bu](16|32|64)", opcode):
                return self._mov(operands, int(found[1]))
            if found := re.fullmatch(r"ld\.param\.(b32|b64|s32|u32)", opcode):
                return self._parameter(operands, found[1])
            if found := ACCESS.fullmatch(opcode):
                return self._access(operands, found[1], found[2], int(found[3] or 1), int(found[4]))
        if not guarded:
            if (found := MATRICES.fullmatch(opcode)) and len(operands) == 2:
                return self._matrices(operands, found[1], int(found[2]))
            if opcode == "bar.sync" and operands == ["0"]:
                return lambda group, where: group.shared.barrier()
            if opcode == "shfl.sync.bfly.b32" and operands[3:] == ["31", "-1"] and operands[2] in SHUFFLES:
                return self._across(operands[:2], "b32", SHUFFLES[operands[2]])
            if opcode in REDUCTIONS and len(operands) == 3:
                return self._across(operands, *REDUCTIONS[opcode])
        raise Refused("unknown")

    def _register(self, text: str, width: int) -> str:
        """Return the text if it is a register of this width."""
        found = re.fullmatch(r"(%[a-z]+)(\d+)", text)
        bits, count = self.banks.get(found[1], (0, 0)) if found else (0, 0)
        if found is None or bits != width or int(found[2]) >= count:
            raise Refused(f"{text} is no register of {width} bits")
        return text

    def _parts(self, text: str, width: int) -> list[str]:
        """Return the name of a register of `width` bits, or of registers in {...} that have `width` bits together."""
        names = [name.strip() for name in text.strip("{}").split(",")]
        return [name if name == "_" else self._register(name, width // len(names)) for name in names]

    def _source(self, text: str, kind: str) -> Source:
        """Return the source that reads a register, or that returns a constant of shape (1, 1)."""
        width, dtype = TYPES[kind]
        if text.startswith("%"):
            self._register(text, width)
            return lambda group: group.read(text).view(dtype)
        whole = re.fullmatch(r"0|-?[1-9]\d*|0[xX][0-9a-fA-F]+", text) and kind[0] in "bus"
        single = re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text) and kind in ("f32", "b32")
        if not (whole or single):
            raise Refused(f"{text} is no {kind}")
        value = int(text[2:], 16) if text[:2].lower() in ("0x", "0f") else int(text)
        if not -(1 << (width - 1)) <= value < 1 << width:
            raise Refused(f"{text} is too large for {kind}")
        constant = np.array([[value % (1 << width)]], STORED[width]).view(dtype)
        return lambda group: constant

    def _half(self, name: str, width: int) -> Source:
        """Return the source that reads a register, or poison if it is unwritten, as the unused half of a pair is."""
        source, poison = self._source(name, f"b{width}"), np.full((1, 1), POISON, STORED[width])
        return lambda group: source(group) if name in group.registers else poison

    def _computed(self, operands: list[str], types: list[str], compute: Compute) -> Act:
        width, dtype = TYPES[types[0]]
        to = self._register(operands[0], width)
        sources = [self._source(text, kind) for text, kind in zip(operands[1:], types[1:], strict=True)]

        def act(group: Group, where: Array | None) -> None:
            result = compute(*(source(group) for source in sources))
            if result.dtype != dtype:
                raise Refused(f"{result.dtype} for {types}")  # NumPy has promoted a type, which PTX never does
            group.write(to, result.view(STORED[width]), where)

        return act

    def _mov(self, operands: list[str], width: int) -> Act:
        """Return a mov, from registers, a constant or a special register, to one or more registers."""
        to, of = self._parts(operands[0], width), operands[1]
        if of in SPECIAL and width == 32:
            sources = [SPECIAL[of]]
        elif of.startswith("{"):
            names = self._parts(of, width)
            sources = [self._half(name, width // len(names)) for name in names]
        else:
            sources = [self._source(of, f"b{width}")]

        def act(group: Group, where: Array | None) -> None:
            parts = np.stack([np.broadcast_to(source(group), group.shape) for source in sources], -1)
            for i, name in enumerate(to):
                if name != "_":
                    group.write(name, parts.view(STORED[width // len(to)])[..., i], where)

        return act

    def _parameter(self, operands: list[str], kind: str) -> Act:
        """Return a load of a parameter into a register of the same width, or extended into one of 64 bits."""
        width, dtype = TYPES[kind]
        wide = width if kind[0] == "b" else 64
        to, name = self._register(operands[0], wide), operands[1].strip("[] ")
        if name not in self.parameters or TYPES[self.parameters[name]][0] != width:
            raise Refused("no such parameter")
        widened = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{wide // 8}")

        def act(group: Group, where: Array | None) -> None:
            value = group.arguments[name].view(dtype).astype(widened)
            group.write(to, value.view(STORED[wide]), where)

        return act

    def _place(self, text: str, space: str) -> tuple[Source, int]:
        """Return the source of an address in square brackets, and the constant that is added to it."""
        found = re.fullmatch(r"\[\s*(%\w+|global_smem)(?:\s*\+\s*(\d+))?\s*\]", text)
        if found is None or (space == "global" and found[1] == "global_smem"):
            raise Refused("unknown operands")
        if found[1] == "global_smem":
            return SPECIAL["global_smem"], int(found[2] or 0)
        return self._source(found[1], "u64" if space == "global" else "u32"), int(found[2] or 0)

    def _access(self, operands: list[str], way: str, space: str, count: int, width: int) -> Act:
        """Return a load or a store of `count` words; a word of 8 bits has a register of 16, which a load extends."""
        text, place = operands if way == "ld" else operands[::-1]
        register = max(width, 16)
        names = self._parts(text, register * count)
        if len(names) != count or "_" in names or (space == "shared" and width != 32):
            raise Refused("unknown operands")
        base, offset = self._place(place, space)

        def act(group: Group, where: Array | None) -> None:
            start = base(group)
            address = np.broadcast_to(start + start.dtype.type(offset), group.shape)
            access = group.access(address, where, width, count)
            target: Memory | Shared = group.memory if space == "global" else group.shared
            if way == "st":
                lanes = access.row, access.thread
                words = np.stack([group.read(name)[lanes] for name in names], -1)
                target.store(access, words.astype(STORED[width]))
                return
            words = target.load(access)
            for i, name in enumerate(names):
                value = group.registers.get(name)  # inactive lanes keep their value, if they have one
                value = np.full(group.shape, POISON, STORED[register]) if value is None else value.copy()
                value[access.row, access.thread] = words[:, i]
                group.write(name, value, None)

        return act

    def _matrices(self, operands: list[str], way: str, count: int) -> Act:
        """Return a load or a store of 8 x 16-byte matrices in shared memory, each in one register of every lane.

        Lanes 8i to 8i + 7 have the addresses of matrix i's rows; lane t has word t % 4 of row t // 4.
        """
        text, place = operands if way == "ld" else operands[::-1]
        names, lane = self._parts(text, 32 * count), np.arange(WARP)
        if len(names) != count or "_" in names:
            raise Refused("unknown operands")
        base, offset = self._place(place, "shared")

        def act(group: Group, where: Array | None) -> None:
            rows = np.broadcast_to(base(group) + np.uint32(offset), group.shape).reshape(group.shape[0], -1, WARP)
            used = rows[..., : 8 * count]
            if (used % 16).any():
                raise Fault(f"misaligned in shared memory: {used[used % 16 > 0][0]:#x}")
            for i, name in enumerate(names):
                words = rows[..., 8 * i + lane // 4] + (lane % 4 * 4).astype(np.uint32)
                access = group.access(words.reshape(group.shape), None, 32, 1)
                if way == "st":
                    group.shared.store(access, group.read(name)[access.row, access.thread][:, None])
                else:
                    group.write(name, group.shared.load(access).reshape(group.shape), None)

        return act

    def _across(self, operands: list[str], kind: str, exchange: Callable[[Array], Array]) -> Act:
        """Return an exchange between all lanes of a warp, as a function of the shape (programs, warps, lanes)."""
        to, source = self._register(operands[0], 32), self._source(self._register(operands[1], 32), kind)
        members = [self._source(text, "b32") for text in operands[2:]]

        def act(group: Group, where: Array | None) -> None:
            if any((mask(group) != EVERY_LANE).any() for mask in members):
                raise Refused("a reduction of some of a warp's lanes")
            warps = source(group).reshape(group.shape[0], -1, WARP)
            result = np.ascontiguousarray(np.broadcast_to(exchange(warps), warps.shape))
            group.write(to, result.view(np.uint32).reshape(group.shape), where)

        return act
