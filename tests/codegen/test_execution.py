"""These tests run code that was compiled for NVIDIA GPUs on this CPU; the bits must be those of the numerics contract.

An access outside the tensors fails a test. A variant that is added to aot.py is tested without a change here; a new
kernel needs a row in `cases.FAMILIES`. `test_statistics.py` runs the sweep with statistics, because its threads
exchange values and `executor.py` does not support that.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import Case, built, cases, instructions, random_bits, reference, verify
from executor import Kernel, OutsideError, Refused
from same import assert_same

from expo.kernels import aot, numerics

Array = Any
MANY = 2**24  # elements
RESERVED = 0x4000  # MAP_NORESERVE: the system provides a page's memory only when the page is written
VARIANTS = {name: variant for name, variant in aot.variants().items() if not name.startswith("statistics")}


def launched(name: str, wide: Sequence[str] = (), types: dict[str, str] | None = None, **constants: Any) -> aot.Variant:
    """Return the variant that the launchers compile for other arguments."""
    variant = VARIANTS[name]
    return variant._replace(
        types=variant.types | (types or {}), constants=variant.constants | constants, wide=tuple(wide) or variant.wide
    )


# Triton passes a number in 32 bits if it fits, and makes narrow accesses if a tensor's address is not aligned.
LAUNCHED = {
    "extrapolate_bf16_n_of_32_bits": launched("extrapolate_bf16", types={"n": "i32"}),
    "extrapolate_bf16_unaligned_sft": launched("extrapolate_bf16", ("aligned_ptr", "out_ptr")),
    "extrapolate_bf16_unaligned_aligned": launched("extrapolate_bf16", ("sft_ptr", "out_ptr")),
    "sweep2_bf16_numbers_of_32_bits": launched("sweep2_bf16", types={"n": "i32", "pitch": "i32"}),
    "sweep1_bf16": launched("sweep2_bf16", K=1),
    "sweep3_bf16": launched("sweep2_bf16", K=3),
    "sweep2_bf16_unaligned": launched("sweep2_bf16", ("alphas_ptr",)),
    "whole_model_bf16_unaligned": launched("whole_model_bf16", ALIGNMENT=1),
}
ALL = VARIANTS | LAUNCHED


@cache
def compiled(name: str, target: str = "cuda:90") -> Any:
    return aot.compiled(ALL[name], aot.target_of(target))


@cache
def kernel(name: str) -> Kernel:
    return built(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_small_launches(name: str) -> None:
    """Every case passes: special values, lengths around 8 and a block, outputs in place, offsets past 2^31 elements."""
    for case in cases(ALL[name]):
        verify(kernel(name), ALL[name], case)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100"])
@pytest.mark.parametrize("name", VARIANTS)
def test_other_gpus(name: str, target: str) -> None:
    """The cases pass for another GPU too if its instructions differ."""
    here, there = (instructions(compiled(name, each).asm["llir"]) for each in ("cuda:90", target))
    if here != there:
        other = built(ALL[name], target)
        for case in cases(ALL[name]):
            verify(other, ALL[name], case)


# Many elements


def weights(n: int) -> tuple[Array, Array]:
    """Return the bf16 weights of a model and of its successor, a tenth of them equal."""
    rng = np.random.default_rng(n)
    aligned = rng.standard_normal(n, np.float32) * np.float32(0.02)
    step = rng.standard_normal(n, np.float32) * np.float32(0.0005) * (np.arange(n) % 10 > 0)
    both = np.empty(n, np.uint16), np.empty(n, np.uint16)
    for x, bits in zip((aligned + step.astype(np.float32), aligned), both, strict=True):
        numerics.narrow(x, "BF16", bits)
    return both


def any_bits(n: int) -> tuple[Array, Array]:
    """Return random bits of bf16; among some million elements each pattern is there many times."""
    return random_bits("BF16", n, 1), random_bits("BF16", n, 2)


@pytest.mark.parametrize("alpha", [0.3, -0.7])
@pytest.mark.parametrize("make", [weights, any_bits])
def test_millions_of_elements(make: Callable[[int], tuple[Array, Array]], alpha: float) -> None:
    name = "extrapolate_bf16"
    verify(kernel(name), ALL[name], Case(*make(MANY + 2049), alphas=[alpha]))


def test_millions_of_elements_swept() -> None:
    verify(kernel("sweep4_bf16"), ALL["sweep4_bf16"], Case(*any_bits(MANY + 4097)))


def test_millions_of_elements_in_many_tensors() -> None:
    """A whole model is computed in place; its tensors have 0 elements to more than the 128 blocks of a table's row."""
    row = 128 * 2048
    edges = [0, 1, 7, 8, 9, 2047, 2048, 2049, row - 1, row, row + 1, 0, 5 * row + 77]
    lengths = [*edges, *np.random.default_rng(0).integers(1, 120_000, 300).tolist()]
    assert sum(lengths) > MANY
    verify(
        kernel("whole_model_bf16"),
        ALL["whole_model_bf16"],
        Case(*any_bits(sum(lengths)), place="aligned", lengths=lengths),
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_outputs_far_apart(bits: int) -> None:
    """The last of four outputs starts more than 2^31 elements after the first, though the pitch fits into 32 bits."""
    variant = launched("sweep4_bf16", types={"pitch": f"i{bits}"})
    pitch, n = (2**31 // 3 + 16) // 16 * 16, 4096 + 13
    case = Case(*any_bits(n))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | RESERVED
    out = np.frombuffer(mmap.mmap(-1, (3 * pitch + n) * 2, flags=flags), np.uint16)
    alphas = np.array(case.alphas, np.float32)
    pointers = {"sft_ptr": case.sft, "aligned_ptr": case.aligned, "out_ptr": out, "alphas_ptr": alphas}
    readable = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in (case.sft, case.aligned, alphas)]
    starts = [out.ctypes.data + k * pitch * 2 for k in range(4)]
    values = {name: x.ctypes.data for name, x in pointers.items()} | {"n": n, "pitch": pitch}
    built(variant).run(range(2), values, readable, [(start, start + n * 2) for start in starts])
    for k, expected in enumerate(reference(("BF16", "BF16"), case, 4)):
        assert_same(out[k * pitch :][:n], expected, "BF16")


# The executor itself


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ld.global.v4.b32", "ld.global.nc.v4.b32", "inline assembly"),
        ("mov.u32 $3, 0x0;", "mov.u32 $3, 0x1;", "inline assembly"),
        ("[ $4 + 0 ]", "[ $4 + 16 ]", "inline assembly"),
        ("ptx.sreg.tid.x", "ptx.sreg.laneid", r"llvm\.nvvm\.read\.ptx\.sreg\.laneid"),
        ("to bfloat", "to bfloat\n  %y = fneg bfloat 0xR0000", "fneg bfloat"),
        ("  ret void", "  store i32 0, ptr addrspace(1) %0\n  ret void", "store i32 0"),
        ("  ret void", "  %x = load i32, ptr addrspace(1) %0\n  ret void", "load i32"),
        ("  ret void", "  call void @other()\n  ret void", "other"),
        ('"nvvm.reqntid"="128"', '"nvvm.reqntid"="256"', "attributes"),
        ("nounwind", 'nounwind "denormal-fp-math-f32"="preserve-sign"', "attributes"),
        ("fsub float", "fsub half", "parsing error"),
    ],
)
def test_what_is_not_known_is_refused(old: str, new: str, said: str) -> None:
    llir = compiled("extrapolate_bf16").asm["llir"]
    assert old in llir
    with pytest.raises(Refused, match=said):
        Kernel(llir.replace(old, new), list(ALL["extrapolate_bf16"].arguments), 128)


def test_statistics_are_refused() -> None:
    with pytest.raises(Refused):
        built(aot.variants()["statistics1_bf16"])


def launch(more: int = 0, shift: int = 0) -> None:
    """Launch over 2048 elements and `more`; all tensors start `shift` bytes past an aligned address."""
    memory = np.zeros(3 * 4096 + 64, np.uint8)
    at = -memory.ctypes.data % 16 + memory.ctypes.data + shift
    sft, aligned, out = ((at + i * 4096, at + (i + 1) * 4096) for i in range(3))
    values = {"sft_ptr": sft[0], "aligned_ptr": aligned[0], "out_ptr": out[0], "n": 2048 + more, "alpha": 0.5}
    kernel("extrapolate_bf16").run(range(2), values, [sft, aligned], [out])


def test_accesses_are_checked() -> None:
    """Accesses outside the ranges raise an error, and so do wide accesses at addresses that are not aligned."""
    launch()
    with pytest.raises(OutsideError, match="of 2 bytes"):
        launch(more=1)
    with pytest.raises(OutsideError, match="of 16 bytes"):
        launch(shift=2)


def test_barriers_are_kept() -> None:
    """If a barrier is removed, threads read shared memory that others have not written yet, and the bits differ."""
    name = "extrapolate_bf16_fp32"
    variant, code = ALL[name], compiled(name)
    barrier = next((line for line in code.asm["llir"].splitlines() if "call void @llvm.nvvm.barrier" in line), "")
    if not barrier:
        pytest.skip("this compiler does without shared memory here")
    broken = Kernel(code.asm["llir"].replace(barrier, "", 1), list(variant.arguments), 128, code.metadata.shared)
    with pytest.raises(AssertionError, match="differ"):
        verify(broken, variant, Case(random_bits("BF16", 2048, 1), random_bits("F32", 2048, 2)))
