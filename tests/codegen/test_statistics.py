"""These tests run the PTX of the sweep with statistics; outputs, partial sums and counts are compared with NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import exact
import numpy as np
import ptx
import pytest
import torch
from cases import with_plain_product
from engine_calls import run_engine
from mutants import package
from same import assert_same
from statistics_mutants import MUTANTS, Mutant

from expo.kernels import aot, numerics, sweep
from expo.kernels.contract import Statistics, working_alpha

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
NAMES = {"*bf16": "BF16", "*fp16": "F16", "*fp32": "F32"}
POISON = 0xA5A5A5A5
ALPHAS = (0.3, -0.7, 1.0, 25.0)
LENGTHS = (1, 7, 8, 9, 2047, 2048, 2049, 4095, 4096, 4097, 3 * 4096 + 13)
STATISTICS = [
    *((name, "cuda:90") for name in aot.variants() if name.startswith("statistics")),
    ("statistics1_bf16", "cuda:80"),
    ("statistics1_bf16", "cuda:100"),
]
PLAIN = [
    *((name, "cuda:90") for name in aot.variants() if name.startswith("extrapolate")),
    *((f"extrapolate_{dtype}", "cuda:100") for dtype in ("bf16", "fp16", "fp32")),
]
Array = Any
Pair = tuple[Array, Array]  # sft and aligned, as bits


class Compiled(NamedTuple):
    variant: Any
    kernel: ptx.Kernel

    @classmethod
    def of(cls, compiler: Any, name: str, target: str) -> Compiled:
        variant = compiler.variants()[name]
        made = compiler.compiled(variant, compiler.target_of(target))
        return cls(variant, ptx.Kernel(made.asm["ptx"], made.metadata.shared))

    @property
    def dtypes(self) -> tuple[str, str]:
        return NAMES[self.variant.types["sft_ptr"]], NAMES[self.variant.types["aligned_ptr"]]

    def run(self, values: dict[str, Any], programs: Any, memory: ptx.Memory, together: int = 64) -> None:
        """Run programs; `values` maps each argument's name to its value, and the hidden arguments get null."""
        arguments = [*(values[name] for name in self.variant.arguments), 0, 0]
        self.kernel.run(programs, arguments, memory, together)


@cache
def compiled(name: str, target: str) -> Compiled:
    return Compiled.of(aot, name, target)


# Inputs


def narrowed(x: Array, dtype: str) -> Array:
    out = np.empty(len(x), numerics.STORAGE[dtype])
    numerics.narrow(x, dtype, out)
    return out.view(BITS[dtype])


def weights(dtype: str, n: int) -> Pair:
    """Return weights like those of a model and of its successor, a tenth of them equal."""
    rng = np.random.default_rng(n)
    aligned = rng.normal(0, 0.02, n).astype(np.float32)
    step = rng.normal(0, 0.0005, n).astype(np.float32) * (rng.random(n) > 0.1)
    return narrowed(aligned + step, dtype), narrowed(aligned, dtype)


def odd_weights(dtype: str, n: int) -> Pair:
    """Return weights in which one operand or both have some zeros of both signs, subnormals, infinities and NaNs."""
    rng, form = np.random.default_rng(n), exact.FORMATS[dtype]
    odd = np.array([0, 1, (1 << form.fraction) - 1, form.infinity, form.infinity + 1, form.mask], BITS[dtype])
    odd = np.concatenate([odd, odd | BITS[dtype](form.mask + 1)])
    sft, aligned = weights(dtype, n)
    sft, aligned = (np.where(rng.random(n) < 0.02, rng.choice(odd, n), x) for x in (sft, aligned))
    both = rng.random(n) < 0.02
    values = rng.choice(odd, n)
    return np.where(both, values, sft), np.where(both, values, aligned)


def any_bits(dtype: str, n: int) -> Pair:
    """Return random bit patterns, a tenth of them special values."""
    rng = np.random.default_rng(n)
    special, last = np.array(exact.specials(dtype), BITS[dtype]), exact.FORMATS[dtype].mask * 2 + 1
    sft, aligned = (
        np.where(rng.random(n) < 0.1, rng.choice(special, n), rng.integers(0, last, n, BITS[dtype], endpoint=True))
        for _ in range(2)
    )
    return sft, aligned


INPUTS = (weights, odd_weights, any_bits)


# Launches and their expected results


class Outcome(NamedTuple):
    """The results of a launch: outputs of shape (K, n), the gaps between them, and rows of sums and counts.

    `sweep.partial_rows` tells how many rows there are.
    """

    outs: Array
    gaps: Array
    sums: Array
    counts: Array


def launch(kernel: Compiled, pair: Pair, order: Any = None, together: int = 64, place: str = "") -> Outcome:
    """Launch over poisoned outputs of exactly the needed length; `place` names the input that is the output too."""
    n, k = len(pair[1]), kernel.variant.constants["K"]
    pitch, rows, memory = (n + 15) // 16 * 16, sweep.partial_rows(n), ptx.Memory()
    flat = np.full(k * pitch, POISON & np.iinfo(pair[1].dtype).max, pair[1].dtype)
    values: dict[str, Any] = {
        "sft_ptr": memory.place(pair[0], place == "sft_ptr"),
        "aligned_ptr": memory.place(pair[1], place == "aligned_ptr"),
        "alphas_ptr": memory.place(np.array(ALPHAS[:k], np.float32)),
        "sums_ptr": memory.place(np.full((rows, 3), POISON, np.uint32), True),
        "counts_ptr": memory.place(np.full((rows, k), POISON, np.uint32), True),
        **{"n": n, "pitch": pitch},
    }
    values["out_ptr"] = values[place] if place else memory.place(flat[: (k - 1) * pitch + n], True)
    kernel.run(values, np.arange(-(-n // sweep.PROGRAM_ELEMENTS)) if order is None else order, memory, together)
    flat[: (k - 1) * pitch + n] = memory.read(values["out_ptr"], flat.dtype)
    sums, counts = (memory.read(values[name], np.uint32).reshape(rows, -1) for name in ("sums_ptr", "counts_ptr"))
    outs = flat.reshape(k, pitch)
    return Outcome(outs[:, :n], outs[:, n:], sums, counts)


def launch_far(kernel: Compiled, pair: Pair) -> Outcome:
    """Launch the programs past element 2^31 of a longer tensor, with outputs that are 2^32 elements apart."""
    n, k, item = len(pair[1]), kernel.variant.constants["K"], pair[1].itemsize
    before = 2**31 // sweep.PROGRAM_ELEMENTS + 1
    rows, memory = sweep.partial_rows(n), ptx.Memory()
    outs = [memory.place(np.zeros_like(pair[1]), True) for _ in range(k * item)][::item]  # a page is 2^32 bytes
    sums, counts = (memory.place(np.full((rows, columns), POISON, np.uint32), True) for columns in (3, k))
    starts = {  # the address of each array, and the bytes that a program has of it
        "sft_ptr": (memory.place(pair[0]), sweep.PROGRAM_ELEMENTS * item),
        "aligned_ptr": (memory.place(pair[1]), sweep.PROGRAM_ELEMENTS * item),
        "out_ptr": (outs[0], sweep.PROGRAM_ELEMENTS * item),
        "sums_ptr": (sums, 2 * 3 * 4),
        "counts_ptr": (counts, 2 * k * 4),
    }
    values = {name: (start - before * size) % 2**64 for name, (start, size) in starts.items()}
    values["alphas_ptr"] = memory.place(np.array(ALPHAS[:k], np.float32))
    values |= {"n": before * sweep.PROGRAM_ELEMENTS + n, "pitch": 2**32}
    kernel.run(values, before + np.arange(-(-n // sweep.PROGRAM_ELEMENTS)), memory)
    got = np.array([memory.read(out, pair[1].dtype) for out in outs])
    return Outcome(got, got[:, n:], *(memory.read(x, np.uint32).reshape(rows, -1) for x in (sums, counts)))


def reference(pair: Pair, dtypes: tuple[str, str], alphas: Sequence[float]) -> tuple[Array, Statistics]:
    outs = [bytearray(pair[1].nbytes) for _ in alphas]
    used = [working_alpha(alpha) for alpha in alphas]
    statistics = run_engine(numerics.extrapolate, *pair, dtypes, outs, used, True)
    assert statistics is not None
    return np.array([np.frombuffer(out, pair[1].dtype) for out in outs]), statistics


def verify(kernel: Compiled, pair: Pair, outcome: Outcome) -> None:
    """Assert that a launch gave the right results.

    The outputs must have the same bits, counts and maximum must be equal, the sums must be within the contract's error,
    and every row must be written.
    """
    outs, expected = reference(pair, kernel.dtypes, ALPHAS[: len(outcome.outs)])
    assert_same(outcome.outs, outs, kernel.dtypes[1])
    assert (outcome.gaps == (POISON & np.iinfo(outs.dtype).max)).all(), "written between the outputs"
    assert (outcome.sums != POISON).all(), "a row of sums is not written"
    assert (outcome.counts != POISON).all(), "a row of counts is not written"
    sums, counts = (torch.from_numpy(x) for x in (outcome.sums.view(np.float32), outcome.counts.view(np.int32)))
    statistics = sweep.statistics(sweep.Partials(sums, counts))
    assert statistics.counts == expected.counts
    assert statistics.max_abs_d == expected.max_abs_d
    assert statistics[:2] == pytest.approx(expected[:2], rel=1e-5, abs=0)


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize(("name", "target"), STATISTICS)
def test_every_length(name: str, target: str, make: Callable[[str, int], Pair]) -> None:
    kernel = compiled(name, target)
    for n in LENGTHS:
        pair = make(kernel.dtypes[1], n)
        verify(kernel, pair, launch(kernel, pair))


@pytest.mark.parametrize(("name", "target"), STATISTICS)
def test_nothing_but_infinite_differences(name: str, target: str) -> None:
    """The maximum and the sums are zero if no difference is finite."""
    kernel = compiled(name, target)
    form = exact.FORMATS[kernel.dtypes[1]]
    sft = np.full(sweep.PROGRAM_ELEMENTS + 9, form.infinity, BITS[kernel.dtypes[1]])
    pair = sft, np.ones_like(sft)
    outcome = launch(kernel, pair)
    verify(kernel, pair, outcome)
    assert not outcome.sums.any()


@pytest.mark.parametrize("make", [weights, odd_weights])
def test_millions_of_elements_in_any_order(make: Callable[[str, int], Pair]) -> None:
    """Every run gives the same bits, even if the programs run in another order and in other groups."""
    kernel, n = compiled("statistics1_bf16", "cuda:90"), 2**21 - 3
    pair = make("BF16", n)
    outcome = launch(kernel, pair)
    verify(kernel, pair, outcome)
    order = np.random.default_rng(0).permutation(-(-n // sweep.PROGRAM_ELEMENTS))
    for again in (launch(kernel, pair), launch(kernel, pair, order, together=37)):
        assert all((x == y).all() for x, y in zip(outcome, again, strict=True))


@pytest.mark.parametrize(("name", "target"), STATISTICS)
def test_offsets_past_two_to_the_31(name: str, target: str) -> None:
    kernel = compiled(name, target)
    for n in (5, sweep.PROGRAM_ELEMENTS, sweep.PROGRAM_ELEMENTS + 2051):
        pair = weights(kernel.dtypes[1], n)
        verify(kernel, pair, launch_far(kernel, pair))


@pytest.mark.parametrize("place", ["sft_ptr", "aligned_ptr"])
def test_in_place(place: str) -> None:
    """If there is one alpha, the output may be an input's memory."""
    kernel = compiled("statistics1_bf16", "cuda:90")
    for n in LENGTHS:
        pair = odd_weights("BF16", n)
        verify(kernel, pair, launch(kernel, pair, place=place))


@pytest.mark.parametrize(("name", "target"), STATISTICS[:-2])
def test_every_barrier_is_needed(name: str, target: str) -> None:
    """If a barrier is removed, a warp may read a value before another warp writes it, or after it is overwritten."""
    kernel = compiled(name, target)
    pair = weights(kernel.dtypes[1], sweep.PROGRAM_ELEMENTS + 13)
    steps = kernel.kernel.instructions
    barriers = [i for i, step in enumerate(steps) if step.text.startswith("bar.")]
    assert barriers
    for i in barriers:
        without = copy(kernel.kernel)
        without.instructions = [*steps[:i], steps[i]._replace(act=lambda group, where: None), *steps[i + 1 :]]
        with pytest.raises(ptx.Fault, match="no barrier"):
            launch(kernel._replace(kernel=without), pair)


def test_rows_for_fewer_elements_do_not_suffice() -> None:
    """The interpreter raises a fault for a write past the partial sums."""
    kernel, pair = compiled("statistics1_bf16", "cuda:90"), weights("BF16", 4097)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "partial_rows", lambda n: 4)
        with pytest.raises(ptx.Fault, match=r"outside the writable buffers: 0x\w+, by program 1, thread 0"):
            launch(kernel, pair)


# Mistakes in the kernel


def passes(kernel: Compiled) -> bool:
    """Return True if the kernel passes the checks of the tests above."""
    try:
        for make, n in product(INPUTS, (7, 2049, 4096, 2 * 4096 + 13)):
            pair = make("BF16", n)
            verify(kernel, pair, launch(kernel, pair))
        verify(kernel, pair, launch_far(kernel, pair))
    except (AssertionError, ptx.Fault):
        return False
    return True


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = package(tmp_path, f"statistics_{mutant.name}", "sweep.py", mutant.old, mutant.new, monkeypatch)
    assert not passes(Compiled.of(mutated, mutant.variant, "cuda:90"))


@pytest.mark.parametrize("name", ["statistics1_bf16", "statistics4_bf16"])
def test_a_copy_without_mistakes_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without a mistake passes, so the copying is not the reason why the mutants fail.

    The copy leaves out other=0.0, which shows that Triton sets the registers of masked lanes to zero itself.
    """
    same = package(tmp_path, f"not_{name}", "sweep.py", ", other=0.0)", ")", monkeypatch, times=2)
    assert passes(Compiled.of(same, name, "cuda:90"))


# The kernel without statistics


def plain(kernel: Compiled, pair: Pair, alpha: float) -> Array:
    n, memory = len(pair[1]), ptx.Memory()
    shift = 0 if kernel.variant.wide else pair[1].itemsize
    values: dict[str, Any] = {
        "sft_ptr": memory.place(pair[0], shift=shift),
        "aligned_ptr": memory.place(pair[1], shift=shift),
        "out_ptr": memory.place(np.full(n, POISON & np.iinfo(pair[1].dtype).max, pair[1].dtype), True, shift),
        **{"n": n, "alpha": alpha},
    }
    kernel.run(values, range(-(-n // kernel.variant.constants["BLOCK"])), memory)
    return memory.read(values["out_ptr"], pair[1].dtype)


@pytest.mark.parametrize(("name", "target"), PLAIN)
def test_special_values(name: str, target: str) -> None:
    """The kernel gives the right bits for every combination of the two dtypes' special values."""
    kernel = compiled(name, target)
    both = list(product(*(exact.specials(dtype) for dtype in kernel.dtypes)))
    sft, aligned = (np.array([x[i] for x in both], BITS[dtype]) for i, dtype in enumerate(kernel.dtypes))
    for alpha in (0.3, 25.0, 1e-30):
        expected, _ = reference((sft, aligned), kernel.dtypes, [alpha])
        assert_same(plain(kernel, (sft, aligned), alpha), expected[0], kernel.dtypes[1])


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_operations_that_may_be_fused_are_refused(target: str) -> None:
    """The interpreter refuses operations without .rn, because the assembler may fuse such a product and a sum."""
    variant = with_plain_product(aot.variants()["extrapolate_bf16"])
    text = aot.compiled(variant, aot.target_of(target), enable_fp_fusion=True).asm["ptx"]
    with pytest.raises(ptx.Refused, match=r"sub\.f32"):
        ptx.Kernel(text)


def test_fusion_shows() -> None:
    """Fused multiply-adds give some other outputs, and exact arithmetic with one rounding gives the same ones."""
    kernel, pair = compiled("extrapolate_bf16", "cuda:90"), weights("BF16", 2**21)
    expected, _ = reference(pair, kernel.dtypes, [0.3])
    assert_same(plain(kernel, pair, 0.3), expected[0], "BF16")
    variant = with_plain_product(kernel.variant)
    text = aot.compiled(variant, aot.target_of("cuda:90"), enable_fp_fusion=True).asm["ptx"]
    got = plain(kernel._replace(kernel=ptx.Kernel(text.replace("sub.f32", "sub.rn.f32"))), pair, 0.3)
    at = np.flatnonzero(got != expected[0])
    assert len(at) > 10
    for i in at[:100]:
        assert got[i] == exact.extrapolate(int(pair[0][i]), "BF16", int(pair[1][i]), "BF16", 0.3, fused=True)
