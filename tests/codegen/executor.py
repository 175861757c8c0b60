"""This module runs, on this CPU, the LLVM IR that Triton makes of a kernel for NVIDIA GPUs, and checks its accesses.

LLVM compiles the arithmetic unchanged. The module replaces the parts that only a GPU has: the numbers of program and
thread become parameters; in inline assembly, accesses become checked loads and stores, and products become LLVM's;
bf16 is rounded with integers, because a CPU's own instruction flushes subnormals. The module refuses everything else
that only a GPU has, so that nothing is skipped in silence. Threads run one after another; if the kernel has barriers,
every thread runs up to a barrier before the first one continues.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import shims

llvm = pytest.importorskip("llvmlite.binding", reason="llvmlite is not installed")

Range = tuple[int, int]  # two addresses: that of the first byte, and that after the last byte

READ, WRITE, SHARED = range(3)  # the lists of ranges
CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "ptr": ctypes.c_int64, "float": ctypes.c_float}
OPERANDS = {"c": "i16", "r": "i32", "l": "i64", "b": "i1"}  # the keys are letters of inline assembly's constraints

KERNEL = re.compile(r"^define ptx_kernel void @(\w+)\((.*)\) .*\{\n((?:.*\n)*?)\}", re.MULTILINE)
ASSEMBLY = re.compile(r'asm sideeffect "([^"]*)", "([^"]*)"')
INITIAL = re.compile(r"mov\.u(?:16|32|64) \$(\d+), (?:0x0|\$(\d+))")
ACCESS = re.compile(
    r"(?:@\$(?P<on>\d+) )?(?P<what>ld|st)\.(?P<space>global|shared::cta)(?:\.v(?P<count>[24]))?\.b(?P<bits>16|32|64) "
    r"(?:\{ (?P<into>.*) \}, )?\[ \$(?P<address>\d+) \+ 0 \](?:, \{ (?P<value>.*) \})?"
)
PRODUCT = re.compile(r'asm "mul\.rn\.f32 \$0, \$1, \$2;", "=f,f,f"')
SHARED_LOAD = re.compile(r"load <4 x i32>, ptr (%\w+), align 16")
CONVERSION = re.compile(
    r"(fptrunc|fpext) (<(\d+) x b?float>|b?float) (%\w+) to (<\d+ x b?float>|b?float)$", re.MULTILINE
)
CONSTANT = re.compile(r"\bf0x([0-9A-F]{8})\b")
NUMBER = re.compile(r"tail call i32 @llvm\.nvvm\.read\.ptx\.sreg\.(ctaid|tid)\.x\(\)")
BARRIER = "  tail call void @llvm.nvvm.barrier.cta.sync.aligned.all(i32 0)\n"
UNKNOWN = re.compile(r" (?:asm|load|store|alloca|atomicrmw|cmpxchg|fence) .*|= f\w+ .*bfloat.*")
PURE = re.compile(r"llvm\.(?:fabs|[su]min|[su]max)\.\w+")  # LLVM's own functions that mean the same on a CPU


class Refused(Exception):
    """The code has something that this module does not know."""


class OutsideError(AssertionError):
    """The kernel accessed memory that is not its own."""


class Access(NamedTuple):
    """A piece of inline assembly that accesses memory.

    `operands` maps the number of an operand to its type. `sources` are the operands that hold the initial items of a
    load or the stored items of a store.
    """

    load: bool
    places: int
    item: str
    width: int
    operands: dict[int, str]
    address: str
    on: str
    sources: list[str | None]

    @classmethod
    def of(cls, text: str, constraints: str) -> Access:
        """Parse one load, with its items' initial values before it, or one store; raise Refused for other code."""
        *before, last = text.removesuffix(";").split(r";\0A\09")
        match, initial = ACCESS.fullmatch(last), [INITIAL.fullmatch(line) for line in before]
        kinds = constraints.split(",")
        outputs = [f"${i}" for i, kind in enumerate(kinds) if kind.startswith("=")]
        if not match or [f"${each[1]}" if each else "" for each in initial] != outputs:
            raise Refused(f"inline assembly: {text}")
        load = match["what"] == "ld"
        items = ((match["into"] if load else match["value"]) or "").split(", ")
        if len(items) != int(match["count"] or 1) or outputs != (items if load else []):
            raise Refused(f"inline assembly: {text}")
        operands = {i: OPERANDS[kind] for i, kind in enumerate(kinds) if i >= len(outputs)}
        operands[int(match["address"])] = "ptr"
        sources = [each[2] for each in initial if each] if load else [each.removeprefix("$") for each in items]
        space = SHARED if match["space"] != "global" else READ if load else WRITE
        on = f"%in{match['on']}" if match["on"] else "true"
        return cls(load, space, f"i{match['bits']}", int(match["bits"]) // 8, operands, match["address"], on, sources)

    def shim(self) -> tuple[str, dict[str, object]]:
        """Return the template of a function that makes the same access, and the words that the template needs."""
        vector = f"<{len(self.sources)} x {self.item}>"
        before, value = vector_of(vector, self.item, self.sources)
        after, result = returned(vector, self.item, len(self.sources))
        return shims.LOAD if self.load else shims.STORE, {
            "OPERANDS": ", ".join(f"{kind} %in{i}" for i, kind in self.operands.items()),
            "ADDRESS": f"%in{self.address}",
            "ON": self.on,
            "WIDTH": self.width * len(self.sources),
            "LIST": self.places,
            **{"VECTOR": vector, "VALUE": value, "RESULT": result, "BEFORE": before, "AFTER": after},
        }


def vector_of(vector: str, item: str, sources: Sequence[str | None]) -> tuple[str, str]:
    """Return instructions that make a vector of operands, with zero for None, and the vector's name."""
    lines, value = [], "zeroinitializer"
    for i, source in enumerate(sources):
        if source:
            lines.append(f"  %set{i} = insertelement {vector} {value}, {item} %in{source}, i64 {i}")
            value = f"%set{i}"
    return "\n".join(lines), value


def returned(vector: str, item: str, count: int) -> tuple[str, str]:
    """Return instructions that return one loaded item or a structure of several, and the type of this result."""
    lines = [f"  %item{i} = extractelement {vector} %loaded, i64 {i}" for i in range(count)]
    if count == 1:
        return "\n".join([*lines, f"  ret {item} %item0"]), item
    kind, value = f"{{ {', '.join([item] * count)} }}", "poison"
    for i in range(count):
        lines.append(f"  %put{i} = insertvalue {kind} {value}, {item} %item{i}, {i}")
        value = f"%put{i}"
    return "\n".join([*lines, f"  ret {kind} {value}"]), kind


def filled(text: str, **words: object) -> str:
    """Return a template with its words replaced."""
    return re.sub(r"\b[A-Z]+\b", lambda word: str(words.get(word[0], word[0])), text)


class Translation:
    """The LLVM IR of a kernel, rewritten for this CPU; `text` is an LLVM module. The constructor may raise Refused."""

    def __init__(self, llir: str, threads: int, shared: int) -> None:
        self._shims: dict[str, str] = {}
        text = re.sub(r"^!.*\n|,? ![\w.]+ !\d+| addrspace\(\d\)", "", llir, flags=re.MULTILINE)
        attributes = set(re.findall(r'"\S+"', "".join(re.findall(r"^attributes.*", text, re.MULTILINE))))
        kernels = KERNEL.findall(text)
        if len(kernels) != 1 or not attributes <= {f'"nvvm.reqntid"="{threads}"'}:
            raise Refused(f"{len(kernels)} kernels, attributes {attributes}")
        ((self.entry, parameters, body),) = kernels
        self.types = [parameter.split()[0] for parameter in parameters.split(", ")]
        self.coroutine = BARRIER in body
        words = {"ENTRY": self.entry, "BODY": self._rewritten(body), "THREADS": threads, "FIRST": len(self.types)}
        words["PARAMETERS"] = ", ".join(f"{kind} %{i}" for i, kind in enumerate(self.types))
        kernel = filled(shims.COROUTINE if self.coroutine else shims.KERNEL, **words)
        self.sites = len(self._shims)
        self.text = "".join([filled(shims.CHECKS, SITES=self.sites, BYTES=shared), *self._shims.values(), kernel])

    def _rewritten(self, body: str) -> str:
        """Return the instructions, with calls in place of a GPU's own instructions."""
        body = re.sub(r" #\d+$", "", body.replace("@global_smem", "@shared"), flags=re.MULTILINE)
        body = ASSEMBLY.sub(self._access, body)
        body = PRODUCT.sub(self._product, body)
        body = SHARED_LOAD.sub(self._shared_load, body) if self.coroutine else body
        body = CONVERSION.sub(self._conversion, body)
        body = CONSTANT.sub(constant, body)
        body = NUMBER.sub(r"add i32 0, %\1", body)
        body = suspending(body) if self.coroutine else body
        names = sorted(set(re.findall(r"@([\w.]+)", body)) - {"shared", "llvm.coro.suspend", *self._shims})
        if unknown := [*UNKNOWN.findall(body), *(name for name in names if not PURE.fullmatch(name))]:
            raise Refused("; ".join(unknown))
        return body.replace("bfloat", "i16")

    def _shim(self, template: str, **words: object) -> str:
        """Add a function for one more access of the code, and return its name."""
        name = f"access.{len(self._shims)}"
        self._shims[name] = filled(template, SITE=len(self._shims), **words)
        return f"@{name}"

    def _access(self, match: re.Match[str]) -> str:
        template, words = Access.of(match[1], match[2]).shim()
        return self._shim(template, **words)

    def _product(self, match: re.Match[str]) -> str:
        """Return the name of the product that no compiler may fuse, and add its function."""
        self._shims["product"] = shims.PRODUCT
        return "@product"

    def _shared_load(self, match: re.Match[str]) -> str:
        """Return a checked call for LLVM's own load; Triton uses that load for shared memory only."""
        kind = "<4 x i32>"
        words = {"VECTOR": kind, "VALUE": "poison", "RESULT": kind, "BEFORE": "", "AFTER": f"ret {kind} %loaded"}
        name = self._shim(shims.LOAD, OPERANDS="ptr %in", ADDRESS="%in", ON="true", WIDTH=16, LIST=SHARED, **words)
        return f"call {kind} {name}(ptr {match[1]})"

    def _conversion(self, match: re.Match[str]) -> str:
        """Return a call that converts fp32 to bf16, or bf16 to fp32."""
        what, source, count, value, target = (each and each.replace("bfloat", "i16") for each in match.groups())
        name, template = f"{what}.{count or 0}", shims.ROUND if what == "fptrunc" else shims.WIDEN
        self._shims[name] = filled(template, NAME=name, SOURCE=source, TARGET=target, COUNT=count or 1)
        return f"call {target} @{name}({source} {value})"


def constant(match: re.Match[str]) -> str:
    """Return an fp32 constant as the bits of a double, which every LLVM reads; Triton's LLVM writes bits of fp32."""
    return f"0x{struct.pack('>d', *struct.unpack('>f', bytes.fromhex(match[1]))).hex()}"


def suspending(body: str) -> str:
    """Return a coroutine's instructions: each barrier becomes a suspension, and the return becomes the last one."""
    if " phi " in body:
        raise Refused("phi in a kernel with barriers")  # a phi would name a block that this function splits
    first, *rest = body.replace("  ret void\n", "  br label %finish\n").split(BARRIER)
    for i, piece in enumerate(rest):
        first += filled(shims.SUSPEND, NUMBER=i, LAST="false", NEXT=f"after{i}") + f"after{i}:\n{piece}"
    return first + "finish:\n" + filled(shims.SUSPEND, NUMBER="last", LAST="true", NEXT="unreached")


class Kernel:
    """A kernel compiled for this CPU."""

    def __init__(self, llir: str, arguments: Sequence[str], threads: int, shared: int = 0) -> None:
        """Compile the LLVM IR, or raise Refused.

        `arguments` are the names of the entry's first parameters; the others are Triton's own, and get null.
        """
        self._names, self._threads, self._shared = arguments, threads, shared
        self._code = Translation(llir, threads, shared)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        try:
            module = llvm.parse_assembly(self._code.text)
        except RuntimeError as error:
            raise Refused(str(error)) from error
        features = llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(module, builder)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def run(
        self,
        programs: range,
        values: Mapping[str, Any],
        readable: Iterable[Range],
        writable: Iterable[Range],
    ) -> None:
        """Run programs; `values` maps each argument to its address or number.

        An access outside all ranges, or at an address that is no multiple of its width, is not made. After all programs
        have run, OutsideError tells the number of such accesses.
        """
        shared = self._address("shared")
        places = [[*readable], [*writable], [(shared, shared + self._shared)]]
        lists = [np.array(each, np.int64).reshape(-1) for each in places]
        limits = [(each.ctypes.data, each.ctypes.data + each.nbytes) for each in lists]
        self._global("lists", 6)[:] = np.array(limits, np.int64).reshape(-1)
        self._global("last", 2 * self._code.sites)[:] = 0
        refused = self._global("refused", 3)
        refused[:] = 0
        given = [values[name] for name in self._names]
        given += [0] * (len(self._code.types) - len(given))
        if self._code.coroutine:
            self._run_by_barriers(programs, given)
        elif programs:
            self._function("drive", None, *self._code.types, "i32", "i32")(*given, programs.start, programs.stop)
        count, address, width = refused.tolist()
        if count:
            raise OutsideError(f"{count} accesses not allowed; the last, of {width} bytes, at {address:#x}")

    def _run_by_barriers(self, programs: range, given: Sequence[Any]) -> None:
        """Run all threads of a program up to a barrier, then all of them up to the next barrier."""
        start = self._function(self._code.entry, ctypes.c_void_p, *self._code.types, "i32", "i32")
        done = self._function("done", ctypes.c_bool, "ptr")
        resume, destroy = (self._function(name, None, "ptr") for name in ("resume", "destroy"))
        for program in programs:
            threads = [start(*given, program, thread) for thread in range(self._threads)]
            while not any(ended := [done(thread) for thread in threads]):
                for thread in threads:
                    resume(thread)
            for thread in threads:
                destroy(thread)
            if not all(ended):
                raise OutsideError("threads wait at a barrier that others never reach")

    def _address(self, name: str) -> int:
        return int(self._engine.get_global_value_address(name))

    def _global(self, name: str, count: int) -> Any:
        """Return a global variable of the module as an array of 64-bit numbers."""
        return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(self._address(name)))

    def _function(self, name: str, result: Any, *types: str) -> Any:
        kind = ctypes.CFUNCTYPE(result, *(CTYPES[each] for each in types))
        return kind(self._engine.get_function_address(name))
