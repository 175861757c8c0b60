"""These tests read the code that the compiler makes of every kernel; they need no GPU.

The instructions must show that no multiply-add is fused, that subnormals are not flushed, that accesses are as wide as
the hardware allows, and that the code accesses no memory except the tensors. A new kernel needs a row in
`aot.variants`, and a row in LIMITS here.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import with_plain_product

from expo.kernels import aot, extrapolate, sweep, whole_model
from expo.kernels.contract import tensor_extrapolation

VARIANTS = aot.variants()
ASSERTED = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
NVIDIA = ASSERTED[:4]
# The tests of all variants compile them for these GPUs only if `exhaustive` tests are asked for.
SELDOM = ("cuda:80", "cuda:100")
PAIR = "extrapolate_bf16"
WIDE = [name for name in VARIANTS if not name.endswith("_unaligned")]


class Limit(NamedTuple):
    """The most registers of a thread, and the most instructions of an element on NVIDIA's GPUs; None is no limit."""

    registers: int
    instructions: float | None


# The keys are the starts of variants' names. A multiprocessor holds 1,536 threads of 40 registers, 1,024 threads of 64
# registers, or 640 threads of 96 registers.
LIMITS = {
    "extrapolate": Limit(40, 10),
    "sweep2": Limit(64, 16),
    "sweep4": Limit(64, 16),
    "statistics": Limit(96, None),
    "whole_model": Limit(48, 10),
}


def limit(name: str) -> Limit:
    return next(limit for start, limit in LIMITS.items() if name.startswith(start))


@cache
def kernel(name: str, target: str = "cuda:90", **options: Any) -> Any:
    return aot.compiled(VARIANTS[name], aot.target_of(target), **options)


@cache
def described(name: str, target: str) -> dict[str, Any]:
    return aot.described(VARIANTS[name], kernel(name, target))


@cache
def sass(name: str, target: str, **options: Any) -> list[str]:
    code = aot.machine_code(kernel(name, target, **options).asm["cubin"])
    if code is None:
        pytest.skip("this Triton ships no nvdisasm")
    return code


def amd_fused(name: str, **options: Any) -> list[str]:
    """Return the fused multiply-adds in AMD assembly, without those that multiply by 1 or -1 and so only add.

    The compiler uses the latter to widen fp16 and add in one instruction, which rounds once.
    """
    fused = re.findall(r"\bv_\w*(?:fma|mad|mac).*", kernel(name, "hip:gfx942", **options).asm["amdgcn"])
    return [line for line in fused if not re.match(r"v_fma_mix_f32 v\d+, -?v\d+, -?1\.0,", line)]


def often(targets: tuple[str, ...]) -> list[Any]:
    """Return the targets as parameters, those of SELDOM with the marker."""
    return [pytest.param(each, marks=pytest.mark.exhaustive if each in SELDOM else ()) for each in targets]


def test_every_variant_has_a_limit() -> None:
    assert all(limit(name) for name in VARIANTS)


@pytest.mark.parametrize(
    "target",
    [pytest.param(each, marks=() if each in ASSERTED else pytest.mark.exhaustive) for each in aot.TARGETS],
)
@pytest.mark.parametrize("name", [PAIR, "sweep2_bf16", "statistics1_bf16", "whole_model_bf16"])
def test_compiles_without_spills_for_every_gpu(target: str, name: str) -> None:
    found = described(name, target)
    assert found["spills"] == 0
    assert kernel(name, target).asm.keys() & {"cubin", "hsaco"}


@pytest.mark.parametrize("target", often(ASSERTED))
@pytest.mark.parametrize("name", VARIANTS)
def test_registers_and_instructions(target: str, name: str) -> None:
    found = described(name, target)
    if found["registers"] is None:
        pytest.skip("this Triton ships no cuobjdump")
    assert found["spills"] == 0
    if name in WIDE:
        assert found["registers"] <= limit(name).registers
        most = limit(name).instructions
        if target in NVIDIA and most is not None:
            assert found["instructions_per_element"] <= most


@pytest.mark.parametrize(
    ("name", "moved"),
    [(PAIR, 6), ("extrapolate_fp32", 12), ("extrapolate_fp32_bf16", 8), ("sweep2_bf16", 8), ("sweep4_bf16", 12)],
)
def test_bytes_for_each_element(name: str, moved: int) -> None:
    assert VARIANTS[name].bytes_per_element == moved


@pytest.mark.parametrize(
    ("name", "moved"), [("statistics1_bf16", 6), ("statistics4_bf16", 12), ("whole_model_bf16", 6)]
)
def test_statistics_and_table_add_next_to_nothing(name: str, moved: int) -> None:
    assert moved < VARIANTS[name].bytes_per_element < moved * 1.002


# Accesses


def body(name: str, target: str) -> list[str]:
    """Return the opcodes of a full block's accesses to global memory, without those to constants and shared memory."""
    return [
        code for code in aot.opcodes(aot.full_program(sass(name, target))) if re.match(r"(LDG|STG|LD\.|ST\.)", code)
    ]


@pytest.mark.parametrize("target", often(NVIDIA))
@pytest.mark.parametrize("name", WIDE)
def test_accesses_of_the_body_are_wide(target: str, name: str) -> None:
    """The tensors' accesses have 128 bits each, and there are as many as the elements need.

    The other accesses read alphas and a row of the table, or write a row of statistics.
    """
    variant, accesses = VARIANTS[name], body(name, target)
    block, alphas = variant.constants["BLOCK"], variant.constants.get("K", 1)
    stores = sum(access.startswith("STG.E.128") for access in accesses)
    loads = sum(access.startswith("LDG.E.128") for access in accesses)
    sft, aligned = (aot.ITEM[kind] for kind in kinds(variant))
    assert stores == alphas * block * aligned // (128 * 16)
    assert loads == block * (sft + aligned) // (128 * 16)
    measured = name.startswith("statistics")
    narrow = {access for access in accesses if ".128" not in access}
    assert narrow <= ({"LDG.E"} if "sweep" in name else {"LDG.E.64"} if "whole" in name else set()) | (
        {"LDG.E", "STG.E"} if measured else set()
    )
    if measured:
        assert sum(access == "STG.E" for access in accesses) == 2 * (3 + alphas)  # a row for each of the two parts


def kinds(variant: aot.Variant) -> tuple[str, str]:
    """Return the dtypes of sft and aligned."""
    if variant.kernel is whole_model.whole_model:
        kind = variant.name.rpartition("_")[2]
        return kind, kind
    return variant.types["sft_ptr"][1:], variant.types["aligned_ptr"][1:]


@pytest.mark.parametrize("name", ["extrapolate_bf16_unaligned", "extrapolate_fp32_unaligned"])
def test_accesses_of_unaligned_tensors_are_narrow(name: str) -> None:
    """Accesses of unaligned tensors are narrow, because wide ones would fault on a GPU."""
    accesses = set(re.findall(r"\b((?:ld|st)\.global[\w.]*)", kernel(name).asm["ptx"]))
    size = "b16" if "bf16" in name else "b32"
    assert accesses == {f"ld.global.{size}", f"st.global.{size}"}


@pytest.mark.parametrize("target", NVIDIA)
def test_loads_come_before_the_arithmetic(target: str) -> None:
    """At least three of a thread's four loads come before its first arithmetic instruction."""
    code = aot.opcodes(sass(PAIR, target))
    first = next(i for i, name in enumerate(code) if re.match(r"F(ADD|MUL|HADD)", name))
    assert sum(name.startswith("LDG.E.128") for name in code[:first]) >= 3


def test_amd_accesses_are_wide() -> None:
    accesses = re.findall(
        r"\b(?:global|buffer|flat|scratch)_((?:load|store)_\w+)", kernel(PAIR, "hip:gfx942").asm["amdgcn"]
    )
    # A wave has 64 threads, so a thread has half as many elements as on an NVIDIA GPU. It makes two loads and one store
    # for a full block, the same for a block that is not full, and then those of the tail.
    assert sorted(accesses) == ["load_dwordx4"] * 4 + ["load_ushort"] * 2 + ["store_dwordx4"] * 2 + ["store_short"]


# Rounding


@pytest.mark.parametrize("target", often(NVIDIA))
@pytest.mark.parametrize("name", VARIANTS)
def test_nvidia_neither_fuses_nor_flushes(target: str, name: str) -> None:
    assert not re.search(r"\b(fma|mad)\.[\w.]*f\d|\.ftz", kernel(name, target).asm["ptx"])
    assert [line for line in sass(name, target) if re.search(r"FFMA|\.FTZ", line)] == []
    # Half-precision instructions may only make constants (0 * 0 + c) and widen fp16 (0 + x), because both are exact.
    halves = [line for line in sass(name, target) if re.search(r"\bH(FMA|ADD|MUL)", line)]
    exact = r"HFMA2\S* R\d+, -RZ, RZ,|HADD2\.F32 R\d+, -RZ, R\d+(\.reuse)?\.H[01]_H[01]"
    assert [line for line in halves if not re.search(exact, line)] == []


def test_ptx_rounds_each_operation() -> None:
    operations = re.findall(r"\b((?:add|sub|mul|fma|mad)\.[\w.]*f32)\b", kernel(PAIR).asm["ptx"])
    assert set(operations) == {"sub.rn.f32", "mul.rn.f32", "add.rn.f32"}
    # The code computes a thread's 16 elements of a full block, its 16 of a block that is not full, and one of the tail.
    assert len(operations) == 3 * (2 * 16 + 1)


def test_fusion_would_show() -> None:
    """The checks above can fail: if fusion is allowed, a plain product gives fused multiply-adds at every layer."""
    allowed = {"enable_fp_fusion": True}
    plain = aot.compiled(with_plain_product(VARIANTS[PAIR]), aot.target_of("cuda:90"), **allowed)
    assert len(re.findall(r"\bfma\.rn\.f32\b", plain.asm["ptx"])) >= 16
    assert "FFMA" in aot.opcodes(aot.machine_code(plain.asm["cubin"]) or ["FFMA"])
    assert amd_fused(PAIR, **allowed)


@pytest.mark.parametrize("name", VARIANTS)
def test_amd_neither_fuses_nor_flushes(name: str) -> None:
    assembly = kernel(name, "hip:gfx942").asm["amdgcn"]
    assert amd_fused(name) == []
    settings = dict(re.findall(r"\.amdhsa_float_(\w+) (\d+)", assembly))
    assert settings["denorm_mode_32"] == settings["denorm_mode_16_64"] == "3"  # subnormals in and out
    assert settings["round_mode_32"] == settings["round_mode_16_64"] == "0"  # to nearest even


# The launchers start the kernels that are compiled here


class Launches:
    """This object replaces a kernel and keeps the grid, arguments and options of its launch."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


@pytest.mark.parametrize(
    ("n", "programs"), [(1, 1), (extrapolate.PROGRAM_ELEMENTS, 1), (extrapolate.PROGRAM_ELEMENTS + 1, 2)]
)
def test_launch(monkeypatch: pytest.MonkeyPatch, n: int, programs: int) -> None:
    launches, tensor = Launches(), torch.zeros(n, dtype=torch.bfloat16)
    monkeypatch.setattr(extrapolate, "extrapolate", launches)
    extrapolate.launch(*tensor_extrapolation(tensor, tensor, (0.25,)), [tensor])
    assert launches.grid == (programs,)
    assert launches.arguments[3:] == (n, 0.25, VARIANTS[PAIR].constants["BLOCK"], True)
    assert launches.options == extrapolate.OPTIONS


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(("n", "programs"), [(1, 1), (sweep.PROGRAM_ELEMENTS, 1), (sweep.PROGRAM_ELEMENTS + 1, 2)])
def test_launch_of_a_sweep(monkeypatch: pytest.MonkeyPatch, n: int, programs: int, measured: bool) -> None:
    launches, tensor = Launches(), torch.zeros(n, dtype=torch.bfloat16)
    monkeypatch.setattr(sweep, "sweep", launches)
    partials = sweep.Partials.empty(n, 2, tensor.device) if measured else None
    arguments = tensor_extrapolation(tensor, tensor, torch.tensor([0.5, 1.0]))
    sweep.launch(*arguments, torch.zeros(2, n + 5, dtype=torch.bfloat16)[:, :n], partials)
    assert launches.grid == (programs,)
    assert launches.arguments[6:] == (n, n + 5)
    assert (launches.arguments[4] is not None) is measured
    constants = {"K": 2, "BLOCK": VARIANTS["sweep2_bf16"].constants["BLOCK"], "PTX": True}
    assert launches.options == {**constants, **extrapolate.OPTIONS}


def test_launch_of_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, parameters = Launches(), whole_model.whole_model.arg_names
    monkeypatch.setattr(whole_model, "whole_model", launches)
    tensors = [
        torch.zeros(n, dtype=torch.bfloat16) for n in (3, 0, whole_model.SEGMENT * extrapolate.PROGRAM_ELEMENTS + 1)
    ]
    whole_model.Table(tensors, tensors, tensors).launch(0.5)
    names = dict(zip(parameters, launches.arguments, strict=True))
    table = names.pop("table_ptr")
    assert launches.grid == (3 * whole_model.SEGMENT,)
    assert table[:, 3].tolist() == [3, whole_model.SEGMENT * extrapolate.PROGRAM_ELEMENTS, 1]
    assert names == {"alpha": 0.5, **VARIANTS["whole_model_bf16"].constants, "PTX": True}
    assert launches.options == extrapolate.OPTIONS


def test_launch_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers start no kernel for no elements, because an empty grid is an error on a GPU."""
    launches, tensor = Launches(), torch.zeros(0, dtype=torch.bfloat16)
    for module, name in ((extrapolate, "extrapolate"), (sweep, "sweep"), (whole_model, "whole_model")):
        monkeypatch.setattr(module, name, launches)
    extrapolate.launch(*tensor_extrapolation(tensor, tensor, (0.25,)), [tensor])
    sweep.launch(*tensor_extrapolation(tensor, tensor, torch.tensor([0.5])), tensor.view(1, 0))
    whole_model.Table([tensor], [tensor], [tensor]).launch(0.5)
    whole_model.Table([], [], []).launch(0.5)
    assert launches.grid == ()


# The command


@pytest.mark.exhaustive  # it compiles every variant
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["extrapolate_bf16", "statistics1_bf16", "whole_model_bf16"]
    monkeypatch.setattr(aot, "variants", lambda: {name: VARIANTS[name] for name in few})
    assert aot.main(["--target", "cuda:90", "--target", "hip:gfx942", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "cuda-90"), str(tmp_path / "hip-gfx942")]
    stages = {"cuda-90": "ttir ttgir llir ptx cubin", "hip-gfx942": "ttir ttgir llir amdgcn hsaco"}
    for folder, endings in stages.items():
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names == {f"{name}.{end}" for name in few for end in endings.split()} | {"kernels.json"}
        entries = json.loads((tmp_path / folder / "kernels.json").read_text())
        assert [entry["variant"] for entry in entries] == few
        assert [each["name"] for each in entries[0]["args"]] == [
            *("sft_ptr", "aligned_ptr", "out_ptr", "n", "alpha"), "global_scratch", "profile_scratch",
        ]  # fmt: skip
        assert [each.get("hidden", False) for each in entries[0]["args"]] == [False] * 5 + [True] * 2
        assert entries[0]["constexprs"] == {"BLOCK": 2048, "PTX": folder == "cuda-90"}
        assert entries[0]["bytes_per_element"] == 6


@pytest.mark.parametrize("name", VARIANTS)
def test_arguments_are_those_of_the_compiled_entry(name: str) -> None:
    """A description lists as many arguments as the PTX declares, with the same sizes."""
    sizes = {"i32": "u32", "i64": "u64", "fp32": "f32"}
    ptx = kernel(name).asm["ptx"]
    declared = re.findall(rf"\.param \.(\w+) .*{kernel(name).metadata.name}_param_\d+", ptx.partition(")")[0])
    arguments = described(name, "cuda:90")["args"]
    assert declared == ["u64" if each["type"].startswith("*") else sizes[each["type"]] for each in arguments]


def test_a_compiler_that_prints_fails_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fails on NVIDIA's assembly for an AMD GPU: LLVM only prints errors and leaves out the product."""
    wrong = VARIANTS[PAIR]._replace(constants={**VARIANTS[PAIR].constants, "PTX": True})
    monkeypatch.setattr(aot, "variants", lambda: {PAIR: wrong})
    for _ in range(2):  # the second time Triton could take the code from its cache, without a message
        assert aot.main(["--target", "hip:gfx942", "--out", str(tmp_path)]) == 1
        said = capfd.readouterr()
        assert said.out == ""
        why = "error: extrapolate_bf16 for hip:gfx942: the code cannot be trusted, as the compiler printed\n"
        assert "could not allocate output register" in said.err.partition(why)[2]
    assert not (tmp_path / "hip-gfx942" / "kernels.json").exists()


def test_what_nvdisasm_adds_for_blackwell_is_no_part_of_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is in the form of release 12.8 of nvdisasm, which Triton 3.5 and 3.6 contain."""
    text = """        /*02f0*/                   FFMA R15, R16, UR4, R21               &req={0}           ?trans1;
        /*0300*/              @!P0 BRA `(.L_x_0)                         ?WAIT5_END_GROUP;
        /*0310*/                   EXIT                                                  ?trans5;
"""
    monkeypatch.setattr(aot, "nvidia_tool", lambda *_: text)
    assert aot.machine_code(b"") == ["FFMA R15, R16, UR4, R21", "@!P0 BRA `(.L_x_0)", "EXIT"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*aot.TARGETS, *VARIANTS]


def test_an_old_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "TOO_OLD", True)
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--target", "cuda:90", "--out", "x"])
    assert stopped.value.code == 2
    assert "Triton 3.3 or later is needed, this is 3." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "tpu:4", "--out", "x"], "a target is cuda:<compute capability> or hip:<architecture>"),
        (["--target", "cuda:90"], "--out"),
        ([], "--target"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        aot.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
