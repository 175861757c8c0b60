"""The Triton kernel compiled for GPUs that need not be there: it compiles for each, rounds as it must, wastes nothing.

No GPU runs here. What the instructions show: no fused multiply-add, no flush of subnormals, accesses as wide as the
hardware has them, and no memory but the tensors'.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
KNOWN = ("3.8.", "3.9.")
if not triton.__version__.startswith(KNOWN):
    reason = f"what a compiler emits is its version's: known are {KNOWN}, this is {triton.__version__}"
    pytest.skip(reason, allow_module_level=True)
extrapolate = pytest.importorskip("expo.kernels.extrapolate")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource

H100 = GPUTarget("cuda", 90, 32)
MI300 = GPUTarget("hip", "gfx942", 64)
TARGETS = [
    *(GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)),
    *(GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")),
    *(GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")),
]
PAIRS = list(product(("bf16", "fp16", "fp32"), repeat=2))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PER_THREAD = extrapolate.BLOCK // (extrapolate.WARPS * 32)


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew, and leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


class Launches:
    """Stands in for the kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


def launched(n: int) -> Launches:
    """How the launcher starts the kernel for n elements."""
    launches, tensor = Launches(), torch.zeros(n, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extrapolate, "_extrapolate", launches)
        extrapolate.launch(tensor, tensor, 0.25, tensor)
    return launches


@cache
def compiled(
    target: Any,
    pair: tuple[str, str] = ("bf16", "bf16"),
    n: str = "i64",
    divisible: bool = True,
    fusion: bool | None = None,
) -> dict[str, Any]:
    """The assembly of each stage, by its name, with the options of the launcher (fusion: instead of the launcher's).

    n: its type; "constexpr" is n = 1, for which Triton compiles a kernel apart.
    """
    sft, aligned = pair
    options = launched(1).options
    signature = {"sft_ptr": f"*{sft}", "aligned_ptr": f"*{aligned}", "out_ptr": f"*{aligned}", "n": n, "alpha": "fp32"}
    constants = {"BLOCK": options.pop("BLOCK")} | ({"n": 1} if n == "constexpr" else {})
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)} if divisible else {}
    source = ASTSource(extrapolate._extrapolate, signature | {"BLOCK": "constexpr"}, constants, attributes)
    options |= {} if fusion is None else {"enable_fp_fusion": fusion}
    return dict(triton.compile(source, target=target, options=options).asm)


def tool(name: str, cubin: bytes, folder: Path, *options: str) -> str:
    """What one of NVIDIA's tools, which Triton ships, prints about a cubin."""
    if not (TOOLS / name).exists():
        pytest.skip(f"this Triton ships no {name}")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([TOOLS / name, *options, file], capture_output=True, text=True, check=True).stdout


def sass(folder: Path, **options: Any) -> list[str]:
    """The machine code's instructions for an H100, without the padding after the end."""
    text = tool("nvdisasm", compiled(H100, **options)["cubin"], folder, "-c")
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return [line for line in lines if line != "NOP"]


def amd_fused(pair: tuple[str, str] = ("bf16", "bf16"), **options: Any) -> list[str]:
    """The fused multiply-adds in AMD assembly; one whose factor is 1 or -1 adds and widens fp16, and rounds once."""
    fused = re.findall(r"\bv_\w*(?:fma|mad|mac).*", compiled(MI300, pair, **options)["amdgcn"])
    return [line for line in fused if not re.match(r"v_fma_mix_f32 v\d+, -?v\d+, -?1\.0,", line)]


def opcodes(instructions: list[str]) -> list[str]:
    """Their names, without the predicate before them and the operands after."""
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in instructions]


@pytest.mark.parametrize(("n", "programs"), [(1, 1), (extrapolate.BLOCK, 1), (extrapolate.BLOCK + 1, 2)])
def test_launch(n: int, programs: int) -> None:
    launches = launched(n)
    assert launches.grid == (programs,)
    assert launches.arguments[3:] == (n, 0.25)
    assert launches.options["enable_fp_fusion"] is False


def test_launch_of_nothing() -> None:
    assert launched(0).grid == ()  # an empty grid is an error on a GPU


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
@pytest.mark.parametrize("n", ["i32", "i64", "constexpr"])
def test_compiles_for_every_gpu(target: Any, n: str) -> None:
    assert compiled(target, n=n).keys() & {"cubin", "hsaco"}


@pytest.mark.parametrize("target", [H100, MI300], ids=lambda target: target.backend)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_compiles_for_every_pair(target: Any, pair: tuple[str, str]) -> None:
    """And none of them fuses or flushes."""
    stages = compiled(target, pair)
    if target is H100:
        assert not re.search(r"\b(fma|mad)\.[\w.]*f32|\.ftz", stages["ptx"])
    else:
        assert amd_fused(pair) == []


# PTX and machine code for NVIDIA


def test_ptx_rounds_each_operation() -> None:
    ptx = compiled(H100)["ptx"]
    operations = re.findall(r"\b((?:add|sub|mul|fma|mad)\.[\w.]*f32)\b", ptx)
    assert set(operations) == {"sub.rn.f32", "mul.rn.f32", "add.rn.f32"}
    assert len(operations) == 3 * (PER_THREAD + 1)  # a thread's elements, and its lane of the tail


def test_fusion_would_show_in_ptx() -> None:
    """The check above can fail: the same kernel with fusion allowed has fused multiply-adds."""
    assert len(re.findall(r"\bfma\.rn\.f32\b", compiled(H100, fusion=True)["ptx"])) >= PER_THREAD


def test_ptx_accesses_are_wide() -> None:
    """Four loads and two stores of 128 bits for a thread's 16 elements; the tail alone goes by single elements."""
    accesses = re.findall(r"\b((?:ld|st)\.(?!param)[\w.]+)", compiled(H100)["ptx"])
    wide = PER_THREAD // 8
    assert accesses.count("ld.global.v4.b32") == 2 * wide
    assert accesses.count("st.global.v4.b32") == wide
    assert sorted(a for a in accesses if ".v4." not in a) == ["ld.global.b16", "ld.global.b16", "st.global.b16"]


def test_ptx_accesses_of_unaligned_tensors_are_narrow() -> None:
    """Wide accesses at such addresses would fault on a GPU."""
    accesses = set(re.findall(r"\b((?:ld|st)\.global[\w.]*)", compiled(H100, divisible=False)["ptx"]))
    assert accesses == {"ld.global.b16", "st.global.b16"}


def test_machine_code_accesses_are_wide(tmp_path: Path) -> None:
    names = opcodes(sass(tmp_path))
    wide = PER_THREAD // 8
    assert names.count("LDG.E.128") == 2 * wide
    assert names.count("STG.E.128") == wide
    memory = [name for name in names if re.match(r"(LD|ST|ATOM|RED)(?!C)", name) and ".128" not in name]
    assert sorted(memory) == ["LDG.E.U16", "LDG.E.U16", "STG.E.U16"]


def test_machine_code_neither_fuses_nor_flushes(tmp_path: Path) -> None:
    names = opcodes(sass(tmp_path))
    arithmetic = [name for name in names if re.match(r"[FH](ADD|MUL|FMA)", name)]
    assert set(arithmetic) == {"FADD", "FMUL"}
    assert len(arithmetic) == 3 * (PER_THREAD + 1)
    assert "FFMA" in opcodes(sass(tmp_path, fusion=True))


def test_registers_stack_and_spills(tmp_path: Path) -> None:
    usage = tool("cuobjdump", compiled(H100)["cubin"], tmp_path, "--dump-resource-usage")
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    assert used.keys() == {"REG", "STACK", "SHARED", "LOCAL"}
    assert used["STACK"] == used["SHARED"] == used["LOCAL"] == 0
    assert used["REG"] <= 40  # 1,600 threads on a multiprocessor, or more


def test_instructions_for_each_element(tmp_path: Path) -> None:
    """Up to where a program without a tail leaves: few enough that memory is what a GPU waits for."""
    names = opcodes(sass(tmp_path))
    assert names.index("EXIT") + 1 <= 12 * PER_THREAD


# Assembly for AMD


def test_amd_neither_fuses_nor_flushes() -> None:
    assembly = compiled(MI300)["amdgcn"]
    assert amd_fused() == []
    assert amd_fused(fusion=True)
    settings = dict(re.findall(r"\.amdhsa_float_(\w+) (\d+)", assembly))
    assert settings["denorm_mode_32"] == settings["denorm_mode_16_64"] == "3"  # subnormals in and out
    assert settings["round_mode_32"] == settings["round_mode_16_64"] == "0"  # to nearest even


def test_amd_accesses_are_wide() -> None:
    accesses = re.findall(
        r"\b((?:global|buffer|flat|scratch|ds)_(?:load|store|read|write)\w*)", compiled(MI300)["amdgcn"]
    )
    # A wave has 64 threads, so half as many elements each as on an NVIDIA GPU: two loads, one store.
    assert sorted(accesses) == [
        "global_load_dwordx4",
        "global_load_dwordx4",
        "global_load_ushort",
        "global_load_ushort",
        "global_store_dwordx4",
        "global_store_short",
    ]


def test_amd_spills_nothing() -> None:
    assembly = compiled(MI300)["amdgcn"]
    numbers = dict(
        re.findall(r"\.(private_segment_fixed_size|[sv]gpr_spill_count|group_segment_fixed_size):\s+(\d+)", assembly)
    )
    assert len(numbers) == 4
    assert set(numbers.values()) == {"0"}
