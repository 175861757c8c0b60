"""These tests show that the tests of the compiled kernels can fail: each mistake in a kernel raises its error."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cases import built, cases, instructions, verify, with_plain_product
from mutants import MUTANTS, Mutant, package

from expo.kernels import aot

KERNELS = ("extrapolate_bf16", "extrapolate_fp32_bf16", "sweep2_bf16", "whole_model_bf16")


def execute(compiler: Any, name: str) -> None:
    """Run all cases of the variant, as `test_execution.py` does."""
    variant = compiler.variants()[name]
    kernel = built(variant, compiler=compiler)
    for case in cases(variant):
        verify(kernel, variant, case)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.variant}-{mutant.name}")
def test_mutants_fail(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{mutant.variant}_{mutant.name}"
    compiler = package(tmp_path, name, mutant.file, mutant.old, mutant.new, monkeypatch)
    with pytest.raises(AssertionError, match=mutant.seen):
        execute(compiler, mutant.variant)


def test_a_copy_without_mistakes_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without a mistake passes, so the copying is not the reason why the mutants fail."""
    compiler = package(tmp_path, "none", "extrapolate.py", "[d, alpha]", "[alpha, d]", monkeypatch)
    for name in KERNELS:
        execute(compiler, name)


# The compiler makes fused multiply-adds if it is allowed to, but not of products in inline assembly


@cache
def compiled(name: str, target: str, fusion: bool, plain: bool = True) -> dict[str, Any]:
    options = {"enable_fp_fusion": True} if fusion else {}
    variant = aot.variants()[name]
    return dict(aot.compiled(with_plain_product(variant) if plain else variant, aot.target_of(target), **options).asm)


def fused(name: str, layer: str, fusion: bool) -> list[str]:
    """Return the fused multiply-adds in one of the compiler's outputs."""
    if layer == "ptx":
        return re.findall(r"\b(?:fma|mad)\.[\w.]*f32\b", compiled(name, "cuda:90", fusion)["ptx"])
    if layer == "sass":
        code = aot.machine_code(compiled(name, "cuda:90", fusion)["cubin"])
        if code is None:
            pytest.skip("this Triton ships no nvdisasm")
        return [opcode for opcode in aot.opcodes(code) if opcode.startswith("FFMA")]
    found = re.findall(r"\bv_\w*(?:fma|mad|mac).*", compiled(name, "hip:gfx942", fusion)["amdgcn"])
    # A multiply-add whose factor is 1 or -1 only widens fp16 and adds; it rounds once, so it is no fused product.
    return [line for line in found if not re.match(r"v_fma_mix_f32 v\d+, -?v\d+, -?1\.0,", line)]


@pytest.mark.parametrize("layer", ["ptx", "sass", "amdgcn"])
@pytest.mark.parametrize("name", KERNELS)
def test_fusion_is_seen(name: str, layer: str) -> None:
    assert len(fused(name, layer, True)) >= 8
    assert fused(name, layer, False) == []


@pytest.mark.parametrize("name", KERNELS)
def test_a_product_in_assembly_is_never_fused(name: str) -> None:
    """The compiler does not fuse a product in inline assembly, even if it is allowed to fuse."""
    asm = compiled(name, "cuda:90", fusion=True, plain=False)
    assert not re.findall(r"\b(?:fma|mad)\.[\w.]*f32\b", asm["ptx"])
    code = aot.machine_code(asm["cubin"])
    assert [opcode for opcode in aot.opcodes(code or []) if opcode.startswith("FFMA")] == []


@pytest.mark.parametrize("name", KERNELS)
def test_fusion_is_not_seen_by_execution(name: str) -> None:
    """Products and sums are fused after the LLVM IR, so executing the IR cannot show that they are not fused."""
    with_fusion, without = (instructions(compiled(name, "cuda:90", fusion)["llir"]) for fusion in (True, False))
    assert with_fusion == without
    variant = with_plain_product(aot.variants()[name])
    kernel = built(variant, enable_fp_fusion=True)
    for case in cases(variant):
        verify(kernel, variant, case)
