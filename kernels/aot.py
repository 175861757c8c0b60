"""python -m expo.kernels.aot: compile the Triton kernels ahead of time, on a machine that needs no GPU.

The command writes one folder for each target: every stage of every variant, from Triton's IR to the machine code, and
kernels.json with the arguments, registers, spills, bytes moved and instructions of each variant.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dtypes import ITEMSIZE, OUTPUT_DTYPES
from . import sweep as sweep_module
from . import whole_model as whole_model_module
from .extrapolate import OPTIONS, PROGRAM_ELEMENTS, extrapolate

TARGETS = (
    *(f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)),
    *(f"hip:{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
)
STAGES = ("ttir", "ttgir", "llir", "ptx", "cubin", "amdgcn", "hsaco")
# Versions before 3.3 take the types of a kernel's arguments in another form.
TOO_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ITEM = {name: ITEMSIZE[dtype] for name, dtype in OUTPUT_DTYPES.items()}  # bytes, by Triton's name of a dtype


class CompilerError(RuntimeError):
    """An error for code that a compiler printed something about.

    LLVM only prints its errors, and Triton then returns code in which a part is missing.
    """


class Variant(NamedTuple):
    """A kernel with fixed dtypes and constants, which can be compiled for any target.

    Attributes:
        name: The name of the variant.
        kernel: The Triton kernel.
        types: The types of its arguments, in order; "constexpr" for those in `constants`.
        constants: The values of its constants, except PTX, which `compiled` sets because it depends on the target.
        wide: The names of the addresses and sizes that are multiples of 16, so that accesses can be wide.
        bytes_per_element: The bytes that the kernel reads and writes for every element of the tensor.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    wide: tuple[str, ...]
    bytes_per_element: float

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments that the compiled kernel takes."""
        return {name: kind for name, kind in self.types.items() if kind != "constexpr"}


def _extrapolate(sft: str, aligned: str, name: str, wide: bool = True) -> Variant:
    types = {"sft_ptr": f"*{sft}", "aligned_ptr": f"*{aligned}", "out_ptr": f"*{aligned}", "n": "i64", "alpha": "fp32"}
    pointers = ("sft_ptr", "aligned_ptr", "out_ptr") if wide else ()
    moved = ITEM[sft] + 2 * ITEM[aligned]
    return Variant(name, extrapolate, types | {"BLOCK": "constexpr"}, {"BLOCK": PROGRAM_ELEMENTS}, pointers, moved)


def _sweep(dtype: str, alphas: int, measured: bool) -> Variant:
    pointers = {"sft_ptr": f"*{dtype}", "aligned_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "alphas_ptr": "*fp32"}
    partials = {"sums_ptr": "*fp32", "counts_ptr": "*i32"} if measured else {}
    absent = {} if measured else {"sums_ptr": None, "counts_ptr": None}
    block = sweep_module.PROGRAM_ELEMENTS
    constants = {**absent, "K": alphas, "BLOCK": block}
    sizes = {"n": "i64", "pitch": "i64"}
    types = {**pointers, **partials, **dict.fromkeys(absent, "constexpr"), **sizes, "K": "constexpr"}
    moved = (2 + alphas) * ITEM[dtype] + (2 * (12 + 4 * alphas) / block if measured else 0)
    name = f"statistics{alphas}_{dtype}" if measured else f"sweep{alphas}_{dtype}"
    wide = (*pointers, *partials, "pitch")
    return Variant(name, sweep_module.sweep, types | {"BLOCK": "constexpr"}, constants, wide, moved)


def _whole_model(dtype: str) -> Variant:
    kinds = whole_model_module.constants(OUTPUT_DTYPES[dtype], OUTPUT_DTYPES[dtype], whole_model_module.ACCESS_BYTES)
    constants = {
        **kinds, "SEGMENT": whole_model_module.SEGMENT, "BLOCK": PROGRAM_ELEMENTS, "IN_MEMORY": False,
    }  # fmt: skip
    types = {"table_ptr": "*i64", "alpha": "fp32"} | dict.fromkeys(constants, "constexpr")
    moved = 3 * ITEM[dtype] + 32 / (whole_model_module.SEGMENT * PROGRAM_ELEMENTS)
    return Variant(f"whole_model_{dtype}", whole_model_module.whole_model, types, constants, ("table_ptr",), moved)


def variants() -> dict[str, Variant]:
    """Return every variant by its name; a new kernel needs a new row here."""
    rows = [
        *(_extrapolate(dtype, dtype, f"extrapolate_{dtype}") for dtype in ITEM),
        *(_extrapolate(s, a, f"extrapolate_{s}_{a}") for s, a in product(ITEM, ITEM) if s != a),
        *(_extrapolate(dtype, dtype, f"extrapolate_{dtype}_unaligned", wide=False) for dtype in ITEM),
        *(_sweep(dtype, alphas, False) for dtype in ITEM for alphas in (2, 4)),
        *(_sweep(dtype, 1, True) for dtype in ITEM),
        _sweep("bf16", 4, True),
        *(_whole_model(dtype) for dtype in ITEM),
    ]
    return {row.name: row for row in rows}


def target_of(text: str) -> GPUTarget:
    """Return the target that a text such as cuda:90 or hip:gfx942 names. Raises ValueError."""
    if match := re.fullmatch(r"cuda:(\d{2,3})", text):
        return GPUTarget("cuda", int(match[1]), 32)
    if match := re.fullmatch(r"hip:(gfx\w+)", text):
        return GPUTarget("hip", match[1], 64 if match[1].startswith("gfx9") else 32)  # CDNA's waves have 64 threads
    raise ValueError(f"a target is cuda:<compute capability> or hip:<architecture>, as {TARGETS[3]}; got {text!r}")


def compiled(variant: Variant, target: GPUTarget, **options: Any) -> Any:
    """Return Triton's compiled kernel, with the options of the launchers and `options`. Raises CompilerError."""
    index = {name: i for i, name in enumerate(variant.types)}
    attributes = {(index[name],): [["tt.divisibility", 16]] for name in variant.wide}
    constants = {"PTX": target.backend == "cuda", **variant.constants}
    source = ASTSource(variant.kernel, {**variant.types, "PTX": "constexpr"}, constants, attributes)
    with _nothing_printed(f"{variant.name} for {target.backend}:{target.arch}"):
        return triton.compile(source, target=target, options={**OPTIONS, **options})


@contextmanager
def _nothing_printed(compilation: str) -> Iterator[None]:
    """Raise CompilerError at the end of the block if the compiler printed anything to stderr (file descriptor 2).

    The text appears on stderr as usual. A separate process copies it, so that the last message of a compiler that
    aborts is not lost.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.NamedTemporaryFile() as copy:
        with subprocess.Popen(["tee", copy.name], stdin=subprocess.PIPE, stdout=kept) as tee:
            assert tee.stdin is not None
            os.dup2(tee.stdin.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                os.close(kept)
        printed = dict.fromkeys(copy.read().decode(errors="replace").strip().splitlines())  # each line once
    if printed:
        lines = "\n".join(list(printed)[:20])
        raise CompilerError(f"{compilation}: the code cannot be trusted, as the compiler printed\n{lines}")


def hidden_arguments(kernel: Any, variant: Variant) -> int:
    """Return the number of parameters beyond the kernel's arguments: Triton's scratch pointers, which are null here."""
    (entry,) = re.findall(rf"^define [^@]*@{kernel.metadata.name}\((.*)\)", kernel.asm["llir"], re.MULTILINE)
    return len(re.findall(r"%\d+", entry)) - len(variant.arguments)


def nvidia_tool(name: str, cubin: bytes, *options: str) -> str | None:
    """Return the output of one of NVIDIA's tools for a cubin; None if this Triton does not ship the tool."""
    if not (TOOLS / name).exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(cubin: bytes) -> list[str] | None:
    """Return the instructions of a cubin, in order, without the padding after the end; None without the tool."""
    text = nvidia_tool("nvdisasm", cubin, "-c")
    if text is None:
        return None
    # For Blackwell nvdisasm 12.8 appends the conditions that an instruction waits for: &req={0} ?trans1
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)(?:\s+[&?]\w[^;]*)?\s*;", text, re.MULTILINE)
    return [line for line in lines if line != "NOP"]


def opcodes(instructions: Sequence[str]) -> list[str]:
    """Return the names of instructions, without the predicate before a name and the operands after it."""
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in instructions]


def full_program(instructions: Sequence[str]) -> Sequence[str]:
    """Return the code that a program with a full block executes, which ends at the first EXIT in all kernels."""
    return instructions[: instructions.index("EXIT") + 1]


def _usage(asm: dict[str, Any]) -> dict[str, int | None]:
    """Return the registers of a thread, and the bytes that it spills to memory or has on a stack."""
    if "amdgcn" in asm:
        pairs = re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", asm["amdgcn"])
        found = {name: int(value) for name, value in pairs}
        return {"registers": found["vgpr_count"], "spills": found["private_segment_fixed_size"]}
    text = nvidia_tool("cuobjdump", asm["cubin"], "--dump-resource-usage")
    if text is None:
        return {"registers": None, "spills": None}
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def described(variant: Variant, kernel: Any) -> dict[str, Any]:
    """Return the variant's entry in kernels.json.

    Numbers that a missing tool would give are None, and so are the instructions of AMD's GPUs.
    """
    block, warps = variant.constants["BLOCK"], kernel.metadata.num_warps
    per_thread = block / (warps * kernel.metadata.target.warp_size)
    code = machine_code(kernel.asm["cubin"]) if "cubin" in kernel.asm else None
    arguments: list[dict[str, Any]] = [{"name": name, "type": kind} for name, kind in variant.arguments.items()]
    given = {"PTX": "ptx" in kernel.asm, **variant.constants}
    names = ("global_scratch", "profile_scratch")[: hidden_arguments(kernel, variant)]
    return {
        "variant": variant.name,
        "entry": kernel.metadata.name,
        "args": arguments + [{"name": name, "type": "*i8", "hidden": True} for name in names],
        "constexprs": {name: value if isinstance(value, int | None) else str(value) for name, value in given.items()},
        "block": block,
        "num_warps": warps,
        "shared": kernel.metadata.shared,
        **_usage(kernel.asm),
        "bytes_per_element": variant.bytes_per_element,
        "instructions_per_element": None if code is None else round(len(full_program(code)) / per_thread, 3),
    }


def write(target: str, folder: Path) -> None:
    """Compile every variant for one target, and write the stages and kernels.json to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for variant in variants().values():
        kernel = compiled(variant, target_of(target))
        for stage in STAGES:
            if stage in kernel.asm:
                data = kernel.asm[stage]
                (folder / f"{variant.name}.{stage}").write_bytes(data if isinstance(data, bytes) else data.encode())
        entries.append(described(variant, kernel))
    (folder / "kernels.json").write_text(json.dumps(entries, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 if a compiler printed something; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(prog="python -m expo.kernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="cuda:90, hip:gfx942; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the parent of the folders, one for each target")
    parser.add_argument("--list", action="store_true", help="name the targets that are tested, and the variants")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join([*TARGETS, "", *variants()]))
        return 0
    if not options.target or options.out is None:
        parser.error("name at least one --target, and the folder --out")
    if TOO_OLD:
        parser.error(f"Triton 3.3 or later is needed, this is {triton.__version__}")
    try:
        for target in options.target:
            target_of(target)
    except ValueError as error:
        parser.error(str(error))
    try:
        for target in options.target:
            folder = options.out / target.replace(":", "-")
            with _fresh_cache():
                write(target, folder)
            print(folder)
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """Give Triton an empty cache, because nobody checked the messages of the compiler about code in the usual cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


if __name__ == "__main__":
    sys.exit(main())
