"""These tests compare every engine with exact arithmetic, and the engines with each other."""

from __future__ import annotations

import math
import random
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import exact
import ml_dtypes
import numpy as np
import pytest
import torch
from engine_calls import run_engine
from float_modes import ROUNDING_MODES, flushing, on_x86, pack, rounding
from same import differing

from expo.dtypes import ITEMSIZE, torch_dtypes
from expo.errors import EngineError
from expo.kernels import numerics, torch_eager
from expo.kernels.contract import (
    Address,
    EngineFunction,
    Operand,
    Scales,
    Statistics,
    Term,
    extrapolation,
    working_alpha,
)

NARROW = ("BF16", "F16", "F32")
PAIRS = list(product(NARROW, NARROW))  # (sft, aligned)
WIDE_PAIRS = [pair for pair in product(ITEMSIZE, ITEMSIZE) if "F64" in pair]
ALPHAS = (0.3, 0.5, 1.0, -0.7, 2.5, 25.0, 1e-30, 3e38)
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
POISON, GUARD = 0xA5, 64  # the byte that fills outputs, and how many such bytes surround an output


def eager(anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool) -> Statistics | None:
    """Call the engine of torch's own operations with copies of the host's memory."""
    n, tensors = anchor.elements, {}

    def uploaded(operand: Operand) -> Operand:
        if id(operand.memory) not in tensors:
            data = bytearray(operand.memory) or bytearray(ITEMSIZE[operand.dtype])
            tensors[id(operand.memory)] = torch.frombuffer(data, dtype=torch_dtypes()[operand.dtype])[:n]
        return operand._replace(memory=tensors[id(operand.memory)])

    outs = [torch.empty(n, dtype=torch_dtypes()[anchor.dtype]) for _ in outputs]
    copies = [Term(term.coefficients, uploaded(term.plus), uploaded(term.minus)) for term in terms]
    statistics = torch_eager.extrapolate(uploaded(anchor), copies, outs, measure)
    for out, output in zip(outs, outputs, strict=True):
        memoryview(output)[: out.nbytes] = out.view(torch.uint8).numpy().tobytes()
    return statistics


# "cpu" is the variant that a merge takes, and the other names are variants that a test asks for.
COMPILED = ("cpu", "avx512", "avx2", "f16c", "portable")


def engine_function(name: str) -> EngineFunction:
    if name not in COMPILED:
        return {"numerics": numerics.extrapolate, "torch_eager": eager}[name]
    try:
        from expo.kernels import cpu
    except ImportError as error:
        pytest.skip(f"the compiled engine is not built: {error}")
    if name == "cpu":
        return cpu.extrapolate
    if name not in cpu.variants():
        pytest.skip(f"this processor has no {name}")
    return partial(cpu.extrapolate, variant=name)


def test_the_best_variant_is_the_first() -> None:
    cpu = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built", exc_type=ImportError)
    names = list(COMPILED[1:])
    assert cpu.variants() == [name for name in names if name in cpu.variants()]
    assert cpu.variants()[-1] == "portable"
    if on_x86() and Path("/proc/cpuinfo").exists():
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
        needed = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma"}, "f16c": {"f16c"}}
        assert set(cpu.variants()) == {"portable"} | {name for name in needed if needed[name] <= flags}


def test_an_unknown_variant_is_refused(cpu: EngineFunction) -> None:
    with pytest.raises(ValueError, match="this processor has no variant sse9"):
        run_engine(partial(cpu, variant="sse9"), bytes(2), bytes(2), B, [bytearray(2)], [0.5])


@pytest.fixture(params=["numerics", *COMPILED[1:], "torch_eager"])
def engine(request: pytest.FixtureRequest) -> EngineFunction:
    return engine_function(request.param)


@pytest.fixture(params=["numerics", *COMPILED[1:]])
def host_engine(request: pytest.FixtureRequest) -> EngineFunction:
    """Return an engine over the host's memory, which takes any address and gives statistics."""
    return engine_function(request.param)


@pytest.fixture(params=COMPILED[1:])
def cpu(request: pytest.FixtureRequest) -> EngineFunction:
    """Return a variant of the compiled engine."""
    return engine_function(request.param)


def compute(
    run: EngineFunction, sft: bytes, aligned: bytes, pair: tuple[str, str], alphas: Sequence[float]
) -> list[Any]:
    """Return the outputs' bits, one array for each alpha."""
    outs = [bytearray([POISON]) * len(aligned) for _ in alphas]
    run_engine(run, sft, aligned, pair, outs, [working_alpha(alpha, *pair) for alpha in alphas])
    return [np.frombuffer(out, BITS[pair[1]]) for out in outs]


def assert_same(out: Any, expected: Any, dtype: str, sft: bytes = b"", aligned: bytes = b"") -> None:
    at = differing(out, expected, dtype)
    shown = [(int(i), hex(out[i]), hex(expected[i])) for i in at[:5]]
    inputs = [(m[i * (len(m) // len(out)) :][: len(m) // len(out)][::-1].hex()) for i in at[:5] for m in (sft, aligned)]
    assert not at.size, f"{at.size} of {out.size} differ; (index, got, expected): {shown}; sft, aligned: {inputs}"


def random_bits(rng: np.random.Generator, dtype: str, n: int) -> bytes:
    return rng.bytes(n * ITEMSIZE[dtype])


def crossed_specials(pair: tuple[str, str]) -> tuple[bytes, bytes]:
    """Return every combination of a special value of sft's dtype with one of aligned's."""
    both = list(product(exact.specials(pair[0]), exact.specials(pair[1])))
    return pack([s for s, _ in both], pair[0]), pack([a for _, a in both], pair[1])


# Comparisons with exact arithmetic


class Golden(NamedTuple):
    sft: bytes
    aligned: bytes
    expected: Any


@cache
def golden(pair: tuple[str, str], alpha: float) -> Golden:
    """Return combinations of special values and random values, with the outputs that exact arithmetic gives."""
    rng = random.Random(f"{pair} {alpha}")
    both = list(product(exact.specials(pair[0]), exact.specials(pair[1])))
    both = rng.sample(both, min(len(both), 600))
    both += [tuple(rng.getrandbits(exact.FORMATS[dtype].bits) for dtype in pair) for _ in range(100)]
    for _ in range(200):  # weights like a model's: sft is near aligned, so that most bits of d count
        a = exact.decode(exact.encode(exact.working(rng.gauss(0, 0.02), "F64"), pair[1]), pair[1])
        near = exact.multiply(a, exact.working(rng.gauss(1, 0.02), "F64"))
        both.append((exact.encode(near, pair[0]), exact.encode(a, pair[1])))
    expected = [exact.extrapolate(s, pair[0], a, pair[1], alpha) for s, a in both]
    return Golden(
        pack([s for s, _ in both], pair[0]),
        pack([a for _, a in both], pair[1]),
        np.array(expected, BITS[pair[1]]),
    )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pair", PAIRS + WIDE_PAIRS, ids="-".join)
def test_exact_arithmetic(engine: EngineFunction, pair: tuple[str, str], alpha: float) -> None:
    sft, aligned, expected = golden(pair, alpha)
    (out,) = compute(engine, sft, aligned, pair, [alpha])
    assert_same(out, expected, pair[1], sft, aligned)


class Pinned(NamedTuple):
    """One element whose output was worked out by hand; None means that NaN is expected."""

    why: str
    pair: tuple[str, str]
    sft: int
    aligned: int
    alpha: float
    expected: int | None


B, H, F = ("BF16", "BF16"), ("F16", "F16"), ("F32", "F32")
PINNED = [
    Pinned("equal values stay", B, 0x3E9A, 0x3E9A, 0.3, 0x3E9A),
    Pinned("-0 with -0 becomes +0", B, 0x8000, 0x8000, 0.3, 0x0000),
    Pinned("-0 with -0 stays under a negative alpha", B, 0x8000, 0x8000, -0.7, 0x8000),
    Pinned("-0 with +0 stays", B, 0x0000, 0x8000, 0.3, 0x8000),
    Pinned("-0 with +0 becomes +0 under a negative alpha", B, 0x0000, 0x8000, -0.7, 0x0000),
    Pinned("tie down to even", B, 0x3F81, 0x3F82, 0.5, 0x3F82),
    Pinned("tie up to even", B, 0x3F80, 0x3F81, 0.5, 0x3F82),
    Pinned("fp16 tie down to even", H, 0x3C01, 0x3C02, 0.5, 0x3C02),
    Pinned("fp16 tie up to even", H, 0x3C00, 0x3C01, 0.5, 0x3C02),
    Pinned("subnormals are kept", B, 0x0000, 0x0001, 1.0, 0x0002),
    Pinned("subnormal tie up to even", B, 0x0000, 0x0001, 0.5, 0x0002),
    Pinned("subnormal tie to -0", B, 0x0001, 0x0000, 0.5, 0x8000),
    Pinned("subnormal to normal", B, 0x0000, 0x007F, 1.0, 0x00FE),
    Pinned("fp16 subnormals are kept", H, 0x0000, 0x0001, 1.0, 0x0002),
    Pinned("fp16 subnormal tie to -0", H, 0x0001, 0x0000, 0.5, 0x8000),
    Pinned("fp32 subnormals are kept", F, 0x00000000, 0x00000001, 1.0, 0x00000002),
    Pinned("overflow in d", B, 0xFF7F, 0x7F7F, 0.3, 0x7F80),
    Pinned("overflow in p", F, 0x00000000, 0x7F000000, 25.0, 0x7F800000),
    Pinned("overflow in p alone, to -inf", B, 0x7F00, 0x3F80, 3e38, 0xFF80),
    Pinned("overflow in the last rounding, a tie", B, 0x7F7E, 0x7F7F, 0.5, 0x7F80),
    Pinned("no overflow below the tie", B, 0x7F7E, 0x7F7F, 0.3, 0x7F7F),
    Pinned("fp16 overflow in the last rounding, a tie", H, 0x7BFE, 0x7BFF, 0.5, 0x7C00),
    Pinned("fp16 no overflow below the tie", H, 0x7BFE, 0x7BFF, 0.3, 0x7BFF),
    Pinned("inf stays", B, 0x3F80, 0x7F80, 0.3, 0x7F80),
    Pinned("inf in sft", B, 0x7F80, 0x3F80, 0.3, 0xFF80),
    Pinned("inf - inf", B, 0x7F80, 0x7F80, 0.3, None),
    Pinned("inf turns over under a negative alpha", B, 0x3F80, 0x7F80, -0.7, None),
    Pinned("bf16 NaN of all ones", B, 0x7FFF, 0x3F80, 0.3, None),
    # Rounding by integer addition without a test for NaN would carry these over into -0 and +0.
    Pinned("fp32 NaN of all ones", ("F32", "BF16"), 0x7FFFFFFF, 0x3F80, 0.3, None),
    Pinned("negative fp32 NaN of all ones", ("F32", "BF16"), 0xFFFFFFFF, 0x3F80, 0.3, None),
    Pinned("fp32 NaN to fp16", ("F32", "F16"), 0x7FFFFFFF, 0x3C00, 0.3, None),
    # These NaNs have bits in the low half only, so cutting that half off would leave inf.
    Pinned("signalling fp32 NaN", ("F32", "BF16"), 0x7F800001, 0x3F80, 0.3, None),
    Pinned("signalling fp32 NaN to fp16", ("F32", "F16"), 0x7F800001, 0x3C00, 0.3, None),
    # These are -(1 + 2^-8 + 2^-40) and -(1 + 2^-11 + 2^-40) in fp64; through fp32 they would become ties, and then 1.
    Pinned("fp64 to bf16 in one rounding", ("F64", "BF16"), 0xBFF0100000001000, 0x0000, 1.0, 0x3F81),
    Pinned("fp64 to fp16 in one rounding", ("F64", "F16"), 0xBFF0020000001000, 0x0000, 1.0, 0x3C01),
    Pinned("fp64 overflow to bf16", ("F64", "BF16"), 0xC80DA48CE468E7C7, 0x0000, 1.0, 0x7F80),
    Pinned("fp64 underflow to bf16", ("F64", "BF16"), 0x8000000000000001, 0x0000, 1.0, 0x0000),
]


@pytest.mark.parametrize("case", PINNED, ids=lambda case: case.why)
def test_pinned(engine: EngineFunction, case: Pinned) -> None:
    """The reference and every engine give what was worked out by hand."""
    form = case.pair[1]
    reference = exact.extrapolate(case.sft, case.pair[0], case.aligned, form, case.alpha)
    sft, aligned = pack([case.sft], case.pair[0]), pack([case.aligned], form)
    out = int(compute(engine, sft, aligned, case.pair, [case.alpha])[0][0])
    if case.expected is None:
        assert exact.is_nan(reference, form)
        assert exact.is_nan(out, form)
    else:
        assert hex(reference) == hex(case.expected)
        assert hex(out) == hex(case.expected)


# Each row has the dtype of both, sft, aligned, the output at alpha 0.3, and the output of a fused multiply-add.
FUSED = [
    ("BF16", 0x4281, 0x40FE, 0xC110, 0xC111),
    ("BF16", 0x41F7, 0x4076, 0xC088, 0xC089),
    ("BF16", 0x4115, 0x3F93, 0xBFA6, 0xBFA7),
    ("BF16", 0x4137, 0x3FEF, 0xBF80, 0xBF81),
    ("BF16", 0x4173, 0x3FD6, 0xC018, 0xC019),
    ("BF16", 0x427A, 0x400C, 0xC17E, 0xC17F),
    ("F16", 0x4924, 0x3D67, 0xBD50, 0xBD51),
    ("F16", 0x494B, 0x40E3, 0x10CC, 0x10CD),
    ("F16", 0x4987, 0x3F17, 0xBC0C, 0xBC0D),
    ("F32", 0x3C49901D, 0x3C4579E2, 0x3C444004, 0x3C444003),
    ("F32", 0x3E93E053, 0x3E975A76, 0x3E986580, 0x3E986581),
]


@pytest.mark.parametrize(("dtype", "sft", "aligned", "expected", "fused"), FUSED)
def test_no_fused_multiply_add(
    engine: EngineFunction, dtype: str, sft: int, aligned: int, expected: int, fused: int
) -> None:
    assert exact.extrapolate(sft, dtype, aligned, dtype, 0.3) == expected
    assert exact.extrapolate(sft, dtype, aligned, dtype, 0.3, fused=True) == fused != expected
    # There are enough elements for vector code, which may be compiled to other instructions than the tail.
    out = compute(engine, pack([sft] * 67, dtype), pack([aligned] * 67, dtype), (dtype, dtype), [0.3])[0]
    assert {hex(bits) for bits in out} == {hex(expected)}


@pytest.mark.parametrize("aligned_dtype", ["BF16", "F16"])
def test_rounding_twice_would_show(engine: EngineFunction, aligned_dtype: str) -> None:
    """The outputs of fp64 arithmetic are rounded once; for these inputs a detour through fp32 gives other bits."""
    pair = ("F64", aligned_dtype)
    tie = 1 + 2.0 ** -(exact.FORMATS[aligned_dtype].fraction + 1)
    values = [sign * tie * (1 + nudge) for sign in (1, -1) for nudge in (2.0**-40, -(2.0**-40), 2.0**-52)]
    sft, aligned = struct.pack(f"<{len(values)}d", *(-v for v in values)), bytes(2 * len(values))
    (out,) = compute(engine, sft, aligned, pair, [1.0])
    twice = [exact.encode(exact.rounded(exact.working(v, "F64"), "F32"), aligned_dtype) for v in values]
    once = [exact.encode(exact.working(v, "F64"), aligned_dtype) for v in values]
    assert sum(a != b for a, b in zip(once, twice, strict=True)) >= 4
    assert out.tolist() == once


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_weights_stay(engine: EngineFunction, alpha: float) -> None:
    """For every finite bf16 value: if aligned and sft have it, the output has the same value."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[bits & 0x7FFF < 0x7F80]
    (out,) = compute(engine, bits.tobytes(), bits.tobytes(), B, [alpha])
    assert np.array_equal(out.view(ml_dtypes.bfloat16), bits.view(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("dtype", "code"), [("F16", "e"), ("F32", "f"), ("F64", "d")])
def test_the_reference_decodes_and_encodes(dtype: str, code: str) -> None:
    """The reference decodes and encodes as Python's own conversions do."""
    rng = random.Random(dtype)
    form = exact.FORMATS[dtype]
    patterns = range(1 << 16) if dtype == "F16" else [rng.getrandbits(form.bits) for _ in range(5000)]
    for bits in [*patterns, *exact.specials(dtype)]:
        value = exact.decode(bits, dtype)
        (number,) = struct.unpack("<" + code, pack([bits], dtype))
        if value.kind is exact.Kind.FINITE:
            assert number == value.size * (-1 if value.negative else 1)
            assert math.copysign(1, number) == (-1 if value.negative else 1)
            assert exact.encode(value, dtype) == bits
        else:
            assert math.isnan(number) == (value.kind is exact.Kind.NAN)


@pytest.mark.parametrize(("dtype", "code"), [("F16", "e"), ("F32", "f")])
def test_the_reference_rounds(dtype: str, code: str) -> None:
    rng = random.Random(dtype)
    form = exact.FORMATS[dtype]
    for _ in range(5000):
        number = math.ldexp(rng.uniform(-1, 1), rng.randint(form.least - form.fraction - 2, 1 - form.least))
        assert struct.pack("<" + code, number) == pack([exact.encode(exact.working(number, "F64"), dtype)], dtype)


# The thread's floating-point mode


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_cpu_in_a_thread_that_flushes(cpu: EngineFunction, pair: tuple[str, str], alpha: float) -> None:
    sft, aligned, expected = golden(pair, alpha)
    (out,) = flushing(lambda: compute(cpu, sft, aligned, pair, [alpha]))
    assert_same(out, expected, pair[1], sft, aligned)


def test_subnormal_alpha_in_a_thread_that_flushes(cpu: EngineFunction) -> None:
    """An alpha that is subnormal in fp32 is not lost in a thread that flushes, neither in rounding nor in use."""
    sft, aligned, alpha = pack([0xFF000000] * 9, "F32"), pack([0x38D1B717] * 9, "F32"), 1e-40
    expected = exact.extrapolate(0xFF000000, "F32", 0x38D1B717, "F32", alpha)
    assert expected != 0x38D1B717  # alpha * d counts
    rounded = working_alpha(alpha, "F32")
    assert rounded == np.float32(alpha) > 0
    out = bytearray(len(sft))
    flushing(lambda: run_engine(cpu, sft, aligned, F, [out], [rounded]))
    assert {hex(bits) for bits in np.frombuffer(out, np.uint32)} == {hex(expected)}


def test_working_alpha_in_a_thread_that_flushes() -> None:
    expected = working_alpha(1e-40, "F32")
    assert expected > 0
    assert flushing(lambda: working_alpha(1e-40, "F32")) == expected


def test_numerics_refuses_a_thread_that_flushes() -> None:
    data = bytes(8)
    with pytest.raises(RuntimeError, match="set_flush_denormal"):
        flushing(lambda: compute(numerics.extrapolate, data, data, B, [0.3]))
    assert compute(numerics.extrapolate, data, data, B, [0.3])[0].tolist() == [0] * 4


def test_cpu_refuses_fp64_in_a_thread_that_flushes(cpu: EngineFunction) -> None:
    """The compiled engine passes fp64 to NumPy, which refuses a thread that flushes."""
    with pytest.raises(RuntimeError, match="set_flush_denormal"):
        flushing(lambda: compute(cpu, bytes(8), bytes(8), ("F64", "F64"), [0.3]))


@on_x86
@pytest.mark.parametrize("mode", ROUNDING_MODES.values(), ids=ROUNDING_MODES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_cpu_in_a_thread_that_rounds_otherwise(cpu: EngineFunction, pair: tuple[str, str], mode: int) -> None:
    sft, aligned, expected = golden(pair, 0.3)
    out = bytearray(len(aligned))
    alpha = working_alpha(0.3)
    rounding(mode, lambda: run_engine(cpu, sft, aligned, pair, [out], [alpha]))
    assert_same(np.frombuffer(out, BITS[pair[1]]), expected, pair[1], sft, aligned)


@on_x86
@pytest.mark.parametrize("mode", ROUNDING_MODES.values(), ids=ROUNDING_MODES)
def test_numerics_refuses_a_thread_that_rounds_otherwise(mode: int) -> None:
    with pytest.raises(RuntimeError, match="nearest even"):
        rounding(mode, numerics.check_floating_point_mode)
    numerics.check_floating_point_mode()


# Comparisons of the compiled engine and of torch's own operations with NumPy


@pytest.mark.parametrize("name", ["cpu", "torch_eager"])
@pytest.mark.parametrize("pair", PAIRS + WIDE_PAIRS, ids="-".join)
def test_agrees_on_random_bits(name: str, pair: tuple[str, str]) -> None:
    rng = np.random.default_rng(len(name))
    n = 100_003
    sft, aligned = random_bits(rng, pair[0], n), random_bits(rng, pair[1], n)
    outs = compute(engine_function(name), sft, aligned, pair, ALPHAS)
    for out, expected in zip(outs, compute(numerics.extrapolate, sft, aligned, pair, ALPHAS), strict=True):
        assert_same(out, expected, pair[1], sft, aligned)


@pytest.mark.parametrize("name", ["cpu", "torch_eager"])
@pytest.mark.parametrize("pair", PAIRS + WIDE_PAIRS, ids="-".join)
def test_agrees_on_special_values(name: str, pair: tuple[str, str]) -> None:
    sft, aligned = crossed_specials(pair)
    outs = compute(engine_function(name), sft, aligned, pair, ALPHAS)
    for out, expected in zip(outs, compute(numerics.extrapolate, sft, aligned, pair, ALPHAS), strict=True):
        assert_same(out, expected, pair[1], sft, aligned)


def fp32_ties(dtype: str) -> Any:
    """Return the bits of every fp32 tie between two neighbours of a 16-bit dtype, and of the fp32 values beside it."""
    form = exact.FORMATS[dtype]
    patterns = np.arange(1 << 16, dtype=np.uint32)
    finite = patterns[patterns & form.mask < form.infinity].astype(np.uint16)
    below, above = (bits.view(KINDS[dtype]).astype(np.float64) for bits in (finite, finite + np.uint16(1)))
    with np.errstate(all="ignore"):
        ties = ((below + above) / 2).astype(np.float32)
    bits = ties[np.isfinite(ties)].view(np.uint32)
    return np.concatenate([bits, bits + np.uint32(1), bits - np.uint32(1)])


@pytest.mark.parametrize("pair", [("F32", "BF16"), ("F32", "F16")], ids="-".join)
def test_agrees_on_ties(cpu: EngineFunction, pair: tuple[str, str]) -> None:
    """The engines agree on ties and the values beside them; with alpha 1 and aligned 0 the output is -sft, rounded."""
    ties = fp32_ties(pair[1])
    sft, aligned = ties.tobytes(), bytes(2 * ties.size)
    (out,), (expected,) = (compute(run, sft, aligned, pair, [1.0]) for run in (cpu, numerics.extrapolate))
    assert np.unique(out).size > 63_000  # the ties reach the whole range
    assert_same(out, expected, pair[1], sft, aligned)


def shifted(data: bytes, offset: int) -> memoryview:
    """Return a copy of the data that starts `offset` bytes into its memory."""
    return memoryview(bytearray(bytes(offset) + data))[offset:]


class Fenced:
    """A poisoned output of `size` bytes at some offset into a buffer, with guard bytes before and after it."""

    def __init__(self, size: int, offset: int) -> None:
        self._buffer = bytearray([POISON]) * (GUARD + offset + size + GUARD)
        self._start = GUARD + offset
        self.memory = memoryview(self._buffer)[self._start : self._start + size]

    def guards_stand(self) -> bool:
        around = self._buffer[: self._start] + self._buffer[self._start + len(self.memory) :]
        return set(around) == {POISON}


def run_shifted(
    run: EngineFunction, sft: bytes, aligned: bytes, pair: tuple[str, str], offsets: tuple[int, int, int]
) -> Any:
    out = Fenced(len(aligned), offsets[2])
    memories = shifted(sft, offsets[0]), shifted(aligned, offsets[1])
    run_engine(run, *memories, pair, [out.memory], [working_alpha(0.3, *pair)])
    assert out.guards_stand(), f"written outside the output of {len(aligned)} bytes at offsets {offsets}"
    return np.frombuffer(out.memory, BITS[pair[1]])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_length(host_engine: EngineFunction, pair: tuple[str, str]) -> None:
    """Lengths around the vector widths and a little over whole blocks are right, each at other byte offsets."""
    rng = np.random.default_rng(7)
    for n in (*range(134), 2047, 2049, 4101, 32_769, 70_001):
        sft, aligned = random_bits(rng, pair[0], n), random_bits(rng, pair[1], n)
        (expected,) = compute(numerics.extrapolate, sft, aligned, pair, [0.3])
        out = run_shifted(host_engine, sft, aligned, pair, (n % 4, n // 4 % 4, n // 16 % 4))
        assert_same(out, expected, pair[1], sft, aligned)


@pytest.mark.parametrize("pair", [*PAIRS, ("F64", "BF16"), ("F64", "F64")], ids="-".join)
def test_every_offset(host_engine: EngineFunction, pair: tuple[str, str]) -> None:
    rng = np.random.default_rng(8)
    n = 133
    sft, aligned = random_bits(rng, pair[0], n), random_bits(rng, pair[1], n)
    (expected,) = compute(numerics.extrapolate, sft, aligned, pair, [0.3])
    for offsets in product(range(4), repeat=3):
        assert_same(run_shifted(host_engine, sft, aligned, pair, offsets), expected, pair[1], sft, aligned)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("pair", PAIRS + WIDE_PAIRS, ids="-".join)
def test_in_place(host_engine: EngineFunction, pair: tuple[str, str], offset: int) -> None:
    """The output may be aligned's memory, or sft's if the dtypes are equal."""
    rng = np.random.default_rng(9)
    n = 40_009
    sft, aligned = random_bits(rng, pair[0], n), random_bits(rng, pair[1], n)
    alpha = working_alpha(0.3, *pair)
    (expected,) = compute(numerics.extrapolate, sft, aligned, pair, [0.3])
    memory = shifted(aligned, offset)
    run_engine(host_engine, sft, memory, pair, [memory], [alpha])
    assert_same(np.frombuffer(memory, BITS[pair[1]]), expected, pair[1])
    if pair[0] == pair[1]:
        memory = shifted(sft, offset)
        run_engine(host_engine, memory, aligned, pair, [memory], [alpha])
        assert_same(np.frombuffer(memory, BITS[pair[1]]), expected, pair[1])


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_several_alphas(host_engine: EngineFunction, pair: tuple[str, str], measure: bool) -> None:
    """One call with many alphas gives the same bits as one call for each alpha."""
    rng = np.random.default_rng(10)
    n = 5003
    sft, aligned = random_bits(rng, pair[0], n), random_bits(rng, pair[1], n)
    alphas = [*ALPHAS, 0.3, *np.linspace(-2, 2, 55).tolist()]
    assert len(alphas) == 64  # the most that the compiled engine takes
    outs = [Fenced(len(aligned), k % 4) for k in range(len(alphas))]
    rounded = [working_alpha(alpha, *pair) for alpha in alphas]
    run_engine(host_engine, sft, aligned, pair, [out.memory for out in outs], rounded, measure)
    assert all(out.guards_stand() for out in outs)
    for alpha, out in zip(alphas, outs, strict=True):
        (expected,) = compute(numerics.extrapolate, sft, aligned, pair, [alpha])
        assert_same(np.frombuffer(out.memory, BITS[pair[1]]), expected, pair[1], sft, aligned)


def test_memory_longer_than_the_anchor(host_engine: EngineFunction) -> None:
    """Only the anchor's length determines how many elements are computed."""
    sft, aligned, out = pack([0x3F80] * 9, "BF16"), pack([0x4000] * 9, "BF16"), bytearray([POISON]) * 18
    run_engine(host_engine, sft, memoryview(aligned)[:10], B, [out], [0.5])
    assert out == pack([0x4020] * 5, "BF16") + bytes([POISON]) * 8


@pytest.mark.parametrize("short", ["sft", "aligned", "out"])
def test_memory_shorter_than_the_anchor(host_engine: EngineFunction, short: str) -> None:
    """Memory that is too short is refused, and so is an anchor whose last element is not whole."""
    sizes = {name: 15 if name == short else 16 for name in ("sft", "aligned", "out")}
    out = bytearray(sizes["out"])
    with pytest.raises(ValueError, match="buffer"):
        run_engine(host_engine, bytes(sizes["sft"]), bytes(sizes["aligned"]), B, [out], [0.5])
    assert not any(out)


@pytest.mark.parametrize("pair", [*PAIRS, ("F64", "BF16"), ("F64", "F64")], ids="-".join)
def test_memory_at_an_address(host_engine: EngineFunction, pair: tuple[str, str]) -> None:
    """An address with a size works like a buffer, at the start of the memory and in the middle."""
    rng = np.random.default_rng(15)
    sft, aligned = random_bits(rng, pair[0], 301), random_bits(rng, pair[1], 301)
    (expected,) = compute(numerics.extrapolate, sft, aligned, pair, [0.3])
    out = bytearray([POISON]) * len(aligned)
    arrays = [np.frombuffer(memory, np.uint8) for memory in (bytearray(sft), bytearray(aligned), out)]
    s, a, o = (
        Operand(Address(array.ctypes.data, array.nbytes), dtype)
        for array, dtype in zip(arrays, (*pair, pair[1]), strict=True)
    )
    item = ITEMSIZE[pair[1]]
    for first, count in ((0, 7), (7, 294)):
        arguments = extrapolation(s.part(first, count), a.part(first, count), [working_alpha(0.3, *pair)])
        assert host_engine(*arguments, [o.part(first, count).memory], False) is None
        assert set(out[(first + count) * item :]) <= {POISON}
    assert_same(np.frombuffer(out, BITS[pair[1]]), expected, pair[1], sft, aligned)


@pytest.mark.parametrize("short", [0, 1, 2])
def test_memory_at_an_address_shorter_than_the_anchor(host_engine: EngineFunction, short: int) -> None:
    arrays = [np.zeros(16, np.uint8) for _ in range(3)]
    s, a, o = (Address(array.ctypes.data, 15 if i == short else 16) for i, array in enumerate(arrays))
    with pytest.raises(ValueError, match="buffer"):
        run_engine(host_engine, s, a, B, [o], [0.5])
    assert not arrays[2].any()


# All pairs of bf16 values


def assert_bf16_pairs(sft_values: Sequence[int]) -> None:
    """Compare every variant with NumPy at alpha 0.3, for all aligned values with each of these sft values."""
    together = 16  # sft values of one call; their memory fits into a cache
    variants = [engine_function(name) for name in pytest.importorskip("expo.kernels.cpu").variants()]
    aligned = np.tile(np.arange(1 << 16, dtype=np.uint16), together).tobytes()
    for i in range(0, len(sft_values), together):
        sft = np.repeat(np.array(sft_values[i : i + together], np.uint16), 1 << 16).tobytes()
        (expected,) = compute(numerics.extrapolate, sft, aligned, B, [0.3])
        for run in variants:
            for measure in (False, True):
                out = bytearray([POISON]) * len(aligned)
                run_engine(run, sft, aligned, B, [out], [working_alpha(0.3)], measure)
                bits = np.frombuffer(out, np.uint16)
                if not np.array_equal(bits, expected):  # NaN may have another payload
                    assert_same(bits, expected, "BF16", sft, aligned)


def test_sampled_bf16_pairs() -> None:
    """The engines agree on 2^24 pairs: all aligned values with one random sft value for each upper byte of bf16."""
    rng = np.random.default_rng(11)
    assert_bf16_pairs([256 * k + int(rng.integers(256)) for k in range(256)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("sft_exponents", range(16))
def test_all_bf16_pairs(sft_exponents: int) -> None:
    assert_bf16_pairs(range(sft_exponents << 12, (sft_exponents + 1) << 12))


# Statistics


class Case(NamedTuple):
    sft: bytes
    aligned: bytes
    n: int


def weights(pair: tuple[str, str], n: int, scale: float = 0.02) -> Case:
    """Return normal weights about 2.5% apart; some are equal, and some are infinite or NaN in sft, aligned or both."""
    rng = np.random.default_rng(12)
    a = rng.standard_normal(n) * scale
    s = a + rng.standard_normal(n) * scale * 0.025
    s[::7] = a[::7]
    a[3::101], s[5::103], a[11::211] = np.inf, np.nan, -np.inf
    s[11::422] = -np.inf
    a[13::107], s[13::107] = -0.0, -0.0
    return Case(s.astype(KINDS[pair[0]]).tobytes(), a.astype(KINDS[pair[1]]).tobytes(), n)


def plain_statistics(case: Case, pair: tuple[str, str], outs: Sequence[bytearray]) -> Statistics:
    """Return the statistics that NumPy's own dtypes and plain formulas give."""
    work = np.float64 if "F64" in pair else np.float32
    stored = np.frombuffer(case.aligned, KINDS[pair[1]])
    with np.errstate(all="ignore"):
        a = stored.astype(work)
        d = a - np.frombuffer(case.sft, KINDS[pair[0]]).astype(work)
        finite = np.isfinite(d)
        a, d = a[finite].astype(np.float64), d[finite].astype(np.float64)
        results = [np.frombuffer(out, KINDS[pair[1]]) for out in outs]
        counts = tuple((int(np.sum(r != stored)), int(np.sum(~np.isfinite(r)))) for r in results)
        return Statistics(float(np.sum(d * d)), float(np.sum(a * a)), float(np.max(np.abs(d), initial=0)), counts)


def measured(
    run: EngineFunction, case: Case, pair: tuple[str, str], alphas: Sequence[float]
) -> tuple[Statistics, list[bytearray]]:
    outs = [bytearray([POISON]) * len(case.aligned) for _ in alphas]
    rounded = [working_alpha(alpha, *pair) for alpha in alphas]
    statistics = run_engine(run, case.sft, case.aligned, pair, outs, rounded, True)
    assert statistics is not None
    return statistics, outs


@pytest.fixture(autouse=True)
def _no_warning_escapes() -> Iterator[None]:
    """Turn every warning into an error, so that an engine that raises a warning fails under any filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("n", [0, 1, 31, 33, 2048, 2049, 100_003])
@pytest.mark.parametrize("pair", [*PAIRS, ("F64", "BF16"), ("F32", "F64"), ("F64", "F64")], ids="-".join)
def test_statistics(host_engine: EngineFunction, pair: tuple[str, str], n: int) -> None:
    case = weights(pair, n)
    statistics, outs = measured(host_engine, case, pair, ALPHAS)
    plain = plain_statistics(case, pair, outs)
    assert statistics.counts == plain.counts
    assert statistics.max_abs_d == plain.max_abs_d
    assert statistics.d_squared == pytest.approx(plain.d_squared, rel=1e-5, abs=0)
    assert statistics.aligned_squared == pytest.approx(plain.aligned_squared, rel=1e-5, abs=0)


def test_statistics_of_equal_differences(host_engine: EngineFunction) -> None:
    """The sum of one repeated term is right, though its roundings all go one way, the worst case for an fp32 sum."""
    n = 100_003
    for term in (0.0123, 0.1, 1 / 3):
        aligned = np.full(n, term, np.float32)
        case = Case(bytes(4 * n), aligned.tobytes(), n)
        statistics, outs = measured(host_engine, case, F, [0.3])
        assert statistics.d_squared == pytest.approx(plain_statistics(case, F, outs).d_squared, rel=1e-5, abs=0)


def test_statistics_of_nothing_finite(host_engine: EngineFunction) -> None:
    case = Case(pack([0x7FC0] * 40, "BF16"), pack([0x3F80] * 40, "BF16"), 40)
    statistics, _ = measured(host_engine, case, B, [0.3])
    assert statistics == Statistics(0.0, 0.0, 0.0, ((40, 40),))


def test_minus_zero_that_became_zero_has_not_changed(host_engine: EngineFunction) -> None:
    case = Case(pack([0x8000] * 40, "BF16"), pack([0x8000] * 40, "BF16"), 40)
    statistics, outs = measured(host_engine, case, B, [0.3])
    assert not any(outs[0])
    assert statistics.counts == ((0, 0),)


@pytest.mark.parametrize("spoilt", ["nothing", "a NaN in sft", "an infinity in aligned", "an output that overflows"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_variants_measure_the_same_bits(pair: tuple[str, str], spoilt: str) -> None:
    """Sums do not depend on the width of vectors, nor on the path of a block: the middle one of three may be spoilt."""
    cpu = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built", exc_type=ImportError)
    rng = np.random.default_rng(15)
    for n in (1, 31, 32, 33, 2048, 3 * 2048 + 45):
        a = rng.standard_normal(n) * 0.02
        s = a + rng.standard_normal(n) * 0.001
        s[::5] = a[::5]
        middle = n * 2 // 3
        if spoilt == "a NaN in sft":
            s[middle] = np.nan
        elif spoilt == "an infinity in aligned":
            a[middle] = np.inf
        elif spoilt == "an output that overflows":
            a[middle], s[middle] = (6e4, 0) if pair[1] == "F16" else (3e38, 0)
        with np.errstate(over="ignore"):
            case = Case(s.astype(KINDS[pair[0]]).tobytes(), a.astype(KINDS[pair[1]]).tobytes(), n)
        results = [measured(engine_function(name), case, pair, (0.3, -0.7, 25.0)) for name in cpu.variants()]
        counted = {statistics.counts[0][1] for statistics, _ in results}
        assert counted == {0 if spoilt == "nothing" else 1}
        for statistics, outs in results:
            assert statistics == results[-1][0]
            for out, expected in zip(outs, results[-1][1], strict=True):
                assert_same(*(np.frombuffer(each, BITS[pair[1]]) for each in (out, expected)), pair[1])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_engines_measure_the_same(cpu: EngineFunction, pair: tuple[str, str]) -> None:
    """The engines' counts and largest differences are equal for any bits."""
    rng = np.random.default_rng(13)
    n = 50_021
    for case in (Case(random_bits(rng, pair[0], n), random_bits(rng, pair[1], n), n), weights(pair, n)):
        ours, outs = measured(cpu, case, pair, ALPHAS)
        theirs, _ = measured(numerics.extrapolate, case, pair, ALPHAS)
        assert ours.counts == theirs.counts == plain_statistics(case, pair, outs).counts
        assert ours.max_abs_d == theirs.max_abs_d


# Several terms


class Sum(NamedTuple):
    """The dtypes of tensors, and terms (coefficients, plus, minus), in which plus and minus are numbers of tensors."""

    why: str
    dtypes: tuple[str, ...]
    terms: tuple[tuple[tuple[float, ...], int, int], ...]


# Tensor 0 is the anchor.
SUMS = [
    Sum("no term", ("BF16",), ()),
    Sum("one term that is not ExPO's", ("BF16", "BF16", "BF16"), (((0.3, -2.0), 1, 2),)),
    Sum("two terms from one base", ("BF16", "BF16", "BF16"), (((0.3,), 0, 1), ((-0.7,), 0, 2))),
    Sum("the same two terms in the other order", ("BF16", "BF16", "BF16"), (((-0.7,), 0, 2), ((0.3,), 0, 1))),
    Sum("task vectors", ("F16", "BF16", "F32"), (((0.5, 1.0), 1, 0), ((0.25, -1.0), 2, 0))),
    Sum("a chain of checkpoints", ("BF16", "F32", "F16", "BF16"), (((1.5,), 0, 1), ((0.5,), 1, 2), ((0.1,), 2, 3))),
    Sum("large coefficients", ("F32", "F32"), (((3e38, 25.0), 0, 1), ((-3e38, -25.0), 0, 1))),
    Sum("fp64 in a term alone", ("BF16", "F64", "BF16"), (((0.3,), 1, 2), ((-0.7,), 2, 0))),
    Sum("fp64 in the anchor", ("F64", "BF16", "F16"), (((0.3,), 0, 1), ((0.1,), 0, 2))),
]


def special_columns(dtypes: Sequence[str]) -> list[list[int]]:
    """Return one list of bit patterns for each dtype: special values, random bits, and values near each other."""
    rng = random.Random("-".join(dtypes))
    rows = [[rng.choice(exact.specials(dtype)) for dtype in dtypes] for _ in range(400)]
    rows += [[rng.getrandbits(exact.FORMATS[dtype].bits) for dtype in dtypes] for _ in range(100)]
    for _ in range(300):
        a = rng.gauss(0, 0.02)
        rows.append([exact.encode(exact.working(a * rng.gauss(1, 0.02), "F64"), dtype) for dtype in dtypes])
    return [list(column) for column in zip(*rows, strict=True)]


@cache
def exact_sums(case: Sum, outputs: int) -> list[list[int]]:
    """Return the bit patterns of each output that exact arithmetic gives for `special_columns`."""
    rows = list(zip(*special_columns(case.dtypes), strict=True))
    return [
        [
            exact.combine(
                (row[0], case.dtypes[0]),
                [(c[k], (row[x], case.dtypes[x]), (row[y], case.dtypes[y])) for c, x, y in case.terms],
            )
            for row in rows
        ]
        for k in range(outputs)
    ]


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.why)
@pytest.mark.parametrize("run", ["numerics", "torch_eager"])
def test_several_terms(run: str, case: Sum) -> None:
    """The sum of any terms, in the order given, has the bits that exact arithmetic gives."""
    columns = special_columns(case.dtypes)
    operands = [Operand(pack(bits, dtype), dtype) for bits, dtype in zip(columns, case.dtypes, strict=True)]
    outputs = len(case.terms[0][0]) if case.terms else 1
    work = [
        Term([working_alpha(c, *case.dtypes) for c in coefficients], operands[x], operands[y])
        for coefficients, x, y in case.terms
    ]
    outs = [bytearray([POISON]) * len(operands[0].memory) for _ in range(outputs)]
    assert engine_function(run)(operands[0], work, outs, False) is None
    for out, expected in zip(outs, exact_sums(case, outputs), strict=True):
        found = np.frombuffer(out, BITS[case.dtypes[0]])
        assert_same(found, np.array(expected, BITS[case.dtypes[0]]), case.dtypes[0])


def test_the_order_of_terms_counts() -> None:
    """Two of the cases above differ in nothing but the order of their terms, and give other bits."""
    first, second = (next(case for case in SUMS if why in case.why) for why in ("from one base", "the other order"))
    assert sorted(first.terms) == sorted(second.terms)
    rows = list(zip(*special_columns(first.dtypes), strict=True))
    found = [
        [
            exact.combine((row[0], "BF16"), [(c[0], (row[x], "BF16"), (row[y], "BF16")) for c, x, y in case.terms])
            for row in rows
        ]
        for case in (first, second)
    ]
    assert found[0] != found[1]


def test_several_terms_in_place() -> None:
    """A single output may be the memory of any input."""
    rng = np.random.default_rng(16)
    data = [random_bits(rng, "F32", 40_009) for _ in range(3)]
    out = bytearray(len(data[0]))

    def run(memories: Sequence[Any], output: Any) -> None:
        o, x, y = (Operand(memory, "F32") for memory in memories)
        numerics.extrapolate(o, [Term([0.5], o, x), Term([-2.0], y, o)], [output], False)

    run(data, out)
    for place in range(3):
        memories = [bytearray(memory) for memory in data]
        run(memories, memories[place])
        assert_same(np.frombuffer(memories[place], np.uint32), np.frombuffer(out, np.uint32), "F32")


def test_one_memory_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms share the read of a tensor that occurs more than once."""
    reads: list[int] = []
    widen = numerics.widen
    monkeypatch.setattr(numerics, "widen", lambda x, dtype: reads.append(x.size) or widen(x, dtype))
    o, x = (Operand(bytes(20), "BF16") for _ in range(2))
    numerics.extrapolate(o, [Term([0.5], o, x), Term([0.25], x, o), Term([1.0], x, x)], [bytearray(20)], False)
    assert reads == [10, 10]


def test_statistics_of_a_term_that_is_not_expos() -> None:
    """The d of the statistics is the term's difference, and the anchor takes aligned's place."""
    o, x, y = (Operand(pack([bits] * 5, "BF16"), "BF16") for bits in (0x3F80, 0x4040, 0x4000))  # 1, 3, 2
    statistics = numerics.extrapolate(o, [Term([2.0], x, y)], [bytearray(10)], True)
    assert statistics == Statistics(5.0, 5.0, 1.0, ((5, 0),))


def test_statistics_are_of_one_term() -> None:
    o = Operand(bytes(4), "BF16")
    for terms in ((), (Term([1.0], o, o), Term([1.0], o, o))):
        with pytest.raises(EngineError, match=f"defined for one term, and there are {len(terms)}"):
            numerics.extrapolate(o, terms, [bytearray(4)], True)


def test_as_many_coefficients_as_outputs() -> None:
    o = Operand(bytes(4), "BF16")
    with pytest.raises(ValueError, match="as many coefficients as there are outputs, 1"):
        numerics.extrapolate(o, [Term([1.0, 2.0], o, o)], [bytearray(4)], False)


OTHER_COMBINATIONS = {
    "no term": lambda o, x: (o, []),
    "two terms": lambda o, x: (o, [Term([1.0], o, x), Term([1.0], o, x)]),
    "another anchor": lambda o, x: (x, [Term([1.0], o, x)]),
}


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
@pytest.mark.parametrize("combination", OTHER_COMBINATIONS)
def test_the_compiled_engine_refuses_other_combinations(cpu: EngineFunction, combination: str, dtype: str) -> None:
    """The compiled engine refuses other combinations, also of F64 tensors, which NumPy computes for this engine."""
    o, x = (Operand(bytes(16), dtype) for _ in range(2))
    out = bytearray([POISON]) * 16
    with pytest.raises(EngineError, match=r"the engine cpu computes only aligned .* use the engine numpy"):
        cpu(*OTHER_COMBINATIONS[combination](o, x), [out], False)
    assert set(out) == {POISON}


@pytest.mark.parametrize("scaled", ["anchor", "minus"])
def test_torch_refuses_scales(scaled: str) -> None:
    plain = Operand(bytes(8), "F32")
    other = plain._replace(scales=Scales(np.ones((1, 1), np.float32), 2, (1, 2)))
    out = bytearray([POISON]) * 8
    sft, aligned = (plain, other) if scaled == "anchor" else (other, plain)
    with pytest.raises(EngineError, match="does not compute with quantised elements"):
        torch_eager.extrapolate(*extrapolation(sft, aligned, [1.0]), [out], False)
    assert set(out) == {POISON}


def test_torch_has_no_statistics() -> None:
    o = Operand.of_tensor(torch.zeros(4))
    with pytest.raises(EngineError, match="no statistics"):
        torch_eager.extrapolate(*extrapolation(o, o, [1.0]), [torch.zeros(4)], True)


# The working alpha


@pytest.mark.parametrize("dtypes", [(), ("BF16", "BF16"), ("F64", "BF16"), ("F64", "F64")])
@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e39, -1e39, 3.4028235677973366e38])
def test_alpha_refused(alpha: float, dtypes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="finite in float32"):
        working_alpha(alpha, *dtypes)


def test_alpha_is_rounded_to_fp32() -> None:
    assert working_alpha(0.3, "BF16", "F16") == float(np.float32(0.3)) != 0.3
    assert working_alpha(0.3, "BF16", "F64") == 0.3
    assert working_alpha(0.3, "F64", "BF16") == 0.3
    assert working_alpha(1, "BF16") == 1.0
    assert working_alpha(3.4028235677973362e38, "F32") == float(np.finfo(np.float32).max)


def test_alpha_below_fp32() -> None:
    assert working_alpha(1e-50, "F32", "BF16") == 0.0
    assert working_alpha(1e-50, "F64", "BF16") == 1e-50
    assert working_alpha(1e-40, "F32") == float(np.float32(1e-40)) > 0
    assert math.copysign(1, working_alpha(-1e-50, "F32")) == -1


@pytest.mark.parametrize("alpha", [*ALPHAS, 1e-40, -1e-44, 2.0**-150, 3 * 2.0**-150, 1e-50, 0.1, 1 / 3])
def test_alpha_as_the_reference_has_it(alpha: float) -> None:
    value = exact.working(alpha, "F32")
    assert working_alpha(alpha, "F32") == value.size * (-1 if value.negative else 1)
