"""These tests check the bits of casts, of an adapter's delta, and of a base plus a delta."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import exact
import ml_dtypes
import numpy as np
import pytest
from exact import Kind, Value, power_of_two
from float_modes import ROUNDING_MODES, flushing, on_x86, pack, rounding
from same import assert_same, differing

from expo.dtypes import ITEMSIZE
from expo.kernels import convert, numerics

NARROW = ("BF16", "F16", "F32")
PAIRS = list(product(ITEMSIZE, ITEMSIZE))
NARROW_PAIRS = list(product(NARROW, NARROW))
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
POISON, GUARD = 0xA5, 64  # the byte that fills outputs, and how many such bytes surround an output
built = pytest.mark.skipif(convert._cpu is None, reason="the compiled engine is not built")
VERSIONS = [*([] if convert._cpu is None else convert._cpu.variants()), "numpy"]


class OneVariant:
    """The compiled engine with one of its variants."""

    def __init__(self, name: str) -> None:
        compiled = convert._cpu
        assert compiled is not None
        self.cast: Callable[..., Any] = lambda *arguments: compiled.cast(*arguments, name)
        self.low_rank: Callable[..., Any] = lambda *arguments: compiled.low_rank(*arguments, name)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `convert` use a variant of the compiled engine or NumPy, and return its name."""
    monkeypatch.setattr(convert, "_cpu", None if request.param == "numpy" else OneVariant(request.param))
    return str(request.param)


def cast(data: bytes, pair: tuple[str, str]) -> Any:
    """Return the bits of the cast, and assert that memory around the output has not changed."""
    n = len(data) // ITEMSIZE[pair[0]]
    memory = bytearray([POISON]) * (n * ITEMSIZE[pair[1]] + 2 * GUARD)
    assert convert.cast(data, pair[0], memoryview(memory)[GUARD:-GUARD], pair[1], n) is None
    assert set(memory[:GUARD] + memory[-GUARD:]) == {POISON}
    return np.frombuffer(memory[GUARD:-GUARD], BITS[pair[1]])


def by_numpy(task: Callable[[], Any]) -> Any:
    """Return the task's result when `convert` uses NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_cpu", None)
        return task()


# cast


def edges(target: str) -> Iterator[Fraction]:
    """Yield values on and beside a format's ties, both subnormal and normal, and values around its largest number."""
    form = exact.FORMATS[target]
    least, ulp = power_of_two(form.least - form.fraction), power_of_two(-form.fraction)
    end = (2 - ulp) * power_of_two(1 - form.least)
    ties = [least * k / 2 for k in range(8)]
    ties += [power_of_two(form.least) + least * k / 2 for k in range(-4, 5)]
    ties += [scale * (1 + ulp * k / 2) for scale in (power_of_two(e) for e in (-9, 0, 5)) for k in range(5)]
    ties += [end, end * (1 + ulp / 8), end + ulp / 2 * power_of_two(1 - form.least), end * 2]
    for tie in ties:
        for off in (0, power_of_two(-23), power_of_two(-40), power_of_two(-52)):
            yield tie * (1 - off)
            yield tie * (1 + off)


def chosen(pair: tuple[str, str]) -> list[int]:
    """Return bit patterns of the source's dtype that a cast may get wrong, and some random ones."""
    form = exact.FORMATS[pair[0]]
    found = [exact.encode(Value(Kind.FINITE, False, size), pair[0]) for size in edges(pair[1])]
    found += exact.specials(pair[0])
    found += np.random.default_rng(5).integers(0, 2**form.bits, 400, np.uint64).tolist()
    return list(dict.fromkeys(bits ^ sign for bits in found for sign in (0, 1 << (form.bits - 1))))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_cast_is_exact_arithmetic_rounded_once(version: str, pair: tuple[str, str]) -> None:
    bits = chosen(pair)
    out = cast(pack(bits, pair[0]), pair)
    expected = np.array([exact.encode(exact.decode(each, pair[0]), pair[1]) for each in bits], BITS[pair[1]])
    assert_same(out, expected, pair[1])
    for each, found in zip(bits, out.tolist(), strict=True):
        assert exact.is_nan(found, pair[1]) == exact.is_nan(each, pair[0]), hex(each)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_zeros_infinities_and_nan(version: str, pair: tuple[str, str]) -> None:
    """The expected bits are written by hand, so that an error in `exact` cannot hide one in a cast."""
    source, target = (exact.FORMATS[dtype] for dtype in pair)
    signs = [(form.bits - 1) for form in (source, target)]
    bits = [0, 1 << signs[0], source.infinity, source.infinity | 1 << signs[0]]
    assert cast(pack(bits, pair[0]), pair).tolist() == [
        0, 1 << signs[1], target.infinity, target.infinity | 1 << signs[1],
    ]  # fmt: skip
    nans = [source.mask, source.infinity + 1, source.mask | 1 << signs[0]]  # 0x7fffffff of fp32 among them
    assert all(exact.is_nan(found, pair[1]) for found in cast(pack(nans, pair[0]), pair).tolist())


@pytest.mark.parametrize("pair", [("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64")], ids="-".join)
def test_all_values_of_16_bits_widened_and_back(version: str, pair: tuple[str, str]) -> None:
    every = np.arange(1 << 16).astype(np.uint16)
    wide = cast(every.tobytes(), pair)
    with np.errstate(invalid="ignore"):
        expected = every.view(KINDS[pair[0]]).astype(KINDS[pair[1]])
    assert_same(wide, expected.view(BITS[pair[1]]), pair[1])
    assert_same(cast(wide.tobytes(), pair[::-1]), every, pair[0])


@built
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_values_of_16_bits_in_pieces_too_short_for_a_vector(dtype: str) -> None:
    every = np.arange(1 << 16).astype(np.uint16)
    whole = cast(every.tobytes(), (dtype, "F32"))
    wide, back = np.empty_like(whole), np.empty_like(every)
    for i in range(0, every.size, 7):
        n = min(7, every.size - i)
        convert.cast(every[i : i + n], dtype, wide[i : i + n], "F32", n)
        convert.cast(wide[i : i + n], "F32", back[i : i + n], dtype, n)
    assert_same(wide, whole, "F32")
    assert_same(back, every, dtype)


@pytest.mark.parametrize("pair", NARROW_PAIRS, ids="-".join)
def test_one_element_at_a_time(version: str, pair: tuple[str, str]) -> None:
    bits = exact.specials(pair[0])
    out = np.concatenate([cast(pack([each], pair[0]), pair) for each in bits])
    assert_same(out, cast(pack(bits, pair[0]), pair), pair[1])


@built
@pytest.mark.parametrize("pair", NARROW_PAIRS, ids="-".join)
def test_compiled_and_numpy_agree(pair: tuple[str, str]) -> None:
    rng = np.random.default_rng(6)
    ordinary = rng.standard_normal(20_003).astype(np.float32) * np.float32(10) ** rng.integers(-9, 4, 20_003)
    for data in (rng.bytes(30_001 * ITEMSIZE[pair[0]]), ordinary.astype(KINDS[pair[0]]).tobytes()):
        assert_same(cast(data, pair), by_numpy(lambda data=data: cast(data, pair)), pair[1])


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_fp64_is_rounded_once(version: str, target: str) -> None:
    """A value of fp64 just above a tie is rounded up; a detour through fp32 would make it a tie and round it down."""
    form = exact.FORMATS[target]
    trap = 1.0 + 2.0 ** -(form.fraction + 1) + 2.0**-52
    assert target == "F32" or float(np.float32(trap)) == 1.0 + 2.0 ** -(form.fraction + 1)
    one = exact.encode(Value(Kind.FINITE, False, Fraction(1)), target)
    assert cast(np.array([trap, -trap]).tobytes(), ("F64", target)).tolist() == [
        one + 1, one + 1 | 1 << (form.bits - 1),
    ]  # fmt: skip
    below = 1.0 + 3 * 2.0 ** -(form.fraction + 1) - 2.0**-52  # is rounded down; through fp32 it would be rounded up
    assert cast(np.array([below]).tobytes(), ("F64", target)).tolist() == [one + 1]
    least = 2.0 ** (form.least - form.fraction - 1)  # half the least subnormal number
    assert cast(np.array([least, np.nextafter(least, 1)]).tobytes(), ("F64", target)).tolist() == [0, 1]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 31, 33, 2047, 2048, 2049, 6151])
def test_sizes(version: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for pair in PAIRS:
        values = rng.standard_normal(n).astype(KINDS[pair[0]])
        assert_same(cast(values.tobytes(), pair), values.astype(KINDS[pair[1]]).view(BITS[pair[1]]), pair[1])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("offset", [1, 3])
def test_addresses_that_are_no_multiple_of_an_element(version: str, pair: tuple[str, str], offset: int) -> None:
    values = np.random.default_rng(9).standard_normal(1013).astype(KINDS[pair[0]])
    source = memoryview(bytes(offset) + values.tobytes())[offset:]
    size = values.size * ITEMSIZE[pair[1]]
    memory = bytearray([POISON]) * (size + 2 * GUARD)
    convert.cast(source, pair[0], memoryview(memory)[offset : offset + size], pair[1], values.size)
    assert memory[offset : offset + size] == values.astype(KINDS[pair[1]]).tobytes()
    assert set(memory[:offset] + memory[offset + size :]) == {POISON}


@pytest.mark.parametrize("before_dtype", ["F32", "F64"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_changed_is_counted(version: str, pair: tuple[str, str], before_dtype: str) -> None:
    """A cast counts the written values that differ from the values before: -0 equals +0, and NaN equals nothing."""
    rng = np.random.default_rng(10)
    bits = [*chosen(pair)[:600], *rng.integers(0, 2 ** exact.FORMATS[pair[0]].bits, 4000, np.uint64).tolist()]
    data = pack(bits, pair[0])
    out = np.empty(len(bits), BITS[pair[1]])
    with np.errstate(all="ignore"):
        before = cast(data, pair).view(KINDS[pair[1]]).astype(KINDS[before_dtype])
        before[::3] *= KINDS[before_dtype](1.5)
        before[1::50] *= -1
    found = convert.cast(data, pair[0], out, pair[1], len(bits), before)
    assert_same(out, cast(data, pair), pair[1])
    with np.errstate(invalid="ignore"):
        after = out.view(KINDS[pair[1]]).astype(np.float64)
    changed = sum(x != y for x, y in zip(after.tolist(), before.tolist(), strict=True))
    finite = sum(abs(x) < float("inf") for x in after.tolist())
    assert found == (changed, len(bits) - finite)
    assert 0 < changed < len(bits) > finite


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_buffers_that_are_too_small(version: str, dtype: str) -> None:
    for source, out in ((15, 16), (16, 15), (0, 16), (16, 0)):
        memory = bytearray([POISON]) * (out * ITEMSIZE[dtype] // 2)
        with pytest.raises(ValueError, match="buffer"):
            convert.cast(bytes(source * ITEMSIZE[dtype] // 2), dtype, memory, dtype, 8)
        assert set(memory) <= {POISON}


def test_memory_that_is_not_to_be_written_to(version: str) -> None:
    memory = bytes(16)
    with pytest.raises((ValueError, BufferError, TypeError)):
        convert.cast(b"\1" * 16, "BF16", memory, "BF16", 8)
    assert not any(memory)


@built
@pytest.mark.parametrize(
    ("codes", "n"), [((-1, 0), 1), ((0, 3), 1), ((3, 0), 1), ((0, 0), -1), ((0, 0), 2**62), ((2, 2), 2**61)]
)
def test_arguments_that_make_no_sense(codes: tuple[int, int], n: int) -> None:
    with pytest.raises(ValueError, match="dtype codes are 0 to 2"):
        convert._cpu.cast(bytes(8), codes[0], bytearray(8), codes[1], n, None)


@built
@pytest.mark.parametrize("pair", NARROW_PAIRS, ids="-".join)
def test_a_thread_that_flushes_gets_the_same(pair: tuple[str, str]) -> None:
    data = pack(chosen(pair), pair[0])
    expected = cast(data, pair)
    assert_same(flushing(lambda: cast(data, pair)), expected, pair[1])


@built
@on_x86
@pytest.mark.parametrize("mode", ROUNDING_MODES.values(), ids=ROUNDING_MODES)
@pytest.mark.parametrize("pair", NARROW_PAIRS, ids="-".join)
def test_a_thread_that_rounds_otherwise_gets_the_same(pair: tuple[str, str], mode: int) -> None:
    data = pack(chosen(pair), pair[0])
    expected = cast(data, pair)
    assert_same(rounding(mode, lambda: cast(data, pair)), expected, pair[1])


def test_numpy_refuses_a_thread_that_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_cpu", None)
    ones = np.ones((1, 1), np.float32)
    tasks: list[Callable[[], Any]] = [
        lambda: cast(bytes(8), ("F32", "BF16")),
        lambda: cast(bytes(8), ("F64", "F32")),
        lambda: convert.low_rank(ones, ones, 1.0, 0, np.empty(1, np.float32)),
        lambda: convert.add_delta(ones, ones, 1.0, np.empty_like(ones)),
    ]
    for task in tasks:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            flushing(task)
        task()


# low_rank


class Product(NamedTuple):
    """The factors of a matrix and their scale."""

    left: Any
    right: Any
    scale: float

    @property
    def size(self) -> int:
        return int(self.left.shape[0] * self.right.shape[1])

    def part(self, first: int, n: int) -> Any:
        """Return the bits of elements [first, first + n), and assert that memory around the output has not changed."""
        memory = np.full(n + 2 * GUARD, 7.0, np.float32)
        convert.low_rank(self.left, self.right, self.scale, first, memory[GUARD : GUARD + n])
        assert set(memory[:GUARD].tolist() + memory[GUARD + n :].tolist()) == {7.0}
        return memory[GUARD : GUARD + n].view(np.uint32).copy()


def random_product(rows: int, rank: int, width: int, scale: float = 0.7, seed: int = 1) -> Product:
    rng = np.random.default_rng((seed, rows, rank, width))
    left = rng.standard_normal((rows, rank)).astype(np.float32)
    return Product(left, rng.standard_normal((rank, width)).astype(np.float32), scale)


def by_definition(of: Product) -> Any:
    """Return the bits of the product by its definition: fp32 operations one after the other, sums from the left."""
    result = np.empty((of.left.shape[0], of.right.shape[1]), np.float32)
    for i, j in np.ndindex(*result.shape):
        total = np.float32(0)
        for k in range(of.left.shape[1]):
            term = np.float32(of.left[i, k] * of.right[k, j])
            total = np.float32(total + term)
        result[i, j] = np.float32(total * np.float32(of.scale))
    return result.view(np.uint32).ravel()


@pytest.mark.parametrize(("rows", "rank", "width"), [(1, 1, 1), (5, 3, 7), (6, 9, 70), (3, 64, 66), (9, 5, 129)])
def test_low_rank_is_its_definition(version: str, rows: int, rank: int, width: int) -> None:
    of = random_product(rows, rank, width, 1 / 3)
    assert_same(of.part(0, of.size), by_definition(of), "F32")


def test_the_order_of_the_sum(version: str) -> None:
    """The sum starts at the left, so that 1e8 + 1 - 1e8 is 0; a fused multiply-add would change the second column."""
    left = np.array([[1e8, 1, -1e8], [1 + 2**-12, -1, 0]], np.float32)
    right = np.array([[1, 1 + 2**-12], [1, 1 + 2**-11], [1, 1]], np.float32)
    found = Product(left, right, 2.0).part(0, 4).view(np.float32)
    assert found[0] == 0
    assert found[3] == 0


def special_product(rows: int, rank: int, width: int) -> Product:
    """Return a product with subnormal numbers, sums that cancel, zeros of either sign, infinities and NaN."""
    of = random_product(rows, rank, width, -1.0)
    rng = np.random.default_rng(3)
    values = np.array([0.0, -0.0, 1e-45, -1e-40, 1e-20, 3e38, -3e38, 1.0, 1e-30, np.inf, np.nan], np.float32)
    for factor in of[:2]:
        some = rng.random(factor.shape) < 0.2
        factor[some] = rng.choice(values[:-2], int(some.sum()))
    of.left[0], of.right[:, 0] = 1e-22, 1e-20
    of.left[1, 0], of.right[0, -1] = np.inf, np.nan
    of.left[2] = 0
    return of


def test_special_values(version: str) -> None:
    of = special_product(7, 4, 67)
    with np.errstate(all="ignore"):
        expected = by_definition(of)
    assert_same(of.part(0, of.size), expected, "F32")
    values = expected.view(np.float32)
    assert np.isnan(values).any()
    assert np.isinf(values).any()
    assert ((values != 0) & (np.abs(values) < 2.0**-126)).any()
    assert ((values == 0) & np.signbit(values)).any()


def cuts(rows: int, width: int) -> list[tuple[int, int]]:
    """Return ranges (first, n) of a matrix: all elements, parts of one row or of several, whole rows, no elements."""
    size = rows * width
    found = [(0, size), (0, 1), (size - 1, 1), (0, 0), (size, 0), (size // 2, 0)]
    found += [(width, size - width), (width // 2, size - width // 2), (1, size - 1), (0, size - 1)]
    found += [(width * 2 // 3, width), (width - 1, 2), (max(width - 65, 0), 70), (width // 3, 4 * width + 5)]
    found += [(width // 2, width // 4), (3, 64), (width, 4 * width), (0, 5 * width + width // 2)]
    return sorted({(first, min(n, size - first)) for first, n in found if first <= size})


@built
@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize(
    ("rows", "width"), [(11, 1), (1, 63), (11, 63), (9, 64), (13, 65), (10, 77), (9, 200), (7, 4096), (6, 11008)]
)
def test_compiled_and_numpy_agree_however_it_is_cut(rows: int, rank: int, width: int) -> None:
    of = random_product(rows, rank, width)
    whole = by_numpy(lambda: of.part(0, of.size))
    for first, n in cuts(rows, width):
        assert_same(of.part(first, n), whole[first : first + n], "F32")


def test_cuts_at_random(version: str) -> None:
    rng = np.random.default_rng(8)
    for seed in range(40):
        rows, rank, width = int(rng.integers(1, 14)), int(rng.integers(1, 9)), int(rng.integers(1, 300))
        of = random_product(rows, rank, width, seed=seed)
        whole = by_numpy(lambda of=of: of.part(0, of.size))
        at = 0
        while at < of.size:
            n = int(rng.integers(1, 3 * width + 2))
            n = min(n, of.size - at)
            assert_same(of.part(at, n), whole[at : at + n], "F32")
            at += n


def test_numpy_s_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    of = random_product(3, 5, 101)
    whole = by_numpy(lambda: of.part(0, of.size))
    monkeypatch.setattr(convert, "_cpu", None)
    monkeypatch.setattr(convert, "CACHE_COLUMNS", 16)
    for first, n in cuts(3, 101):
        assert_same(of.part(first, n), whole[first : first + n], "F32")


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (3, 0.5), (16, 1 / 3), (64, 2.0), (256, 16 / 7)])
def test_the_error_is_that_of_as_many_roundings(version: str, rank: int, scale: float) -> None:
    of = random_product(17, rank, 129, scale)
    found = of.part(0, of.size).view(np.float32).reshape(17, 129)
    left, right = of.left.astype(np.float64), of.right.astype(np.float64)
    size = abs(scale) * (np.abs(left) @ np.abs(right))
    # Each term is rounded as a product, in at most rank - 1 sums, and with the scale, which is itself rounded.
    assert (np.abs(found - scale * (left @ right)) <= (rank + 2) * 2.0**-24 * size).all()
    assert np.abs(found - scale * (left @ right)).max() > 0


def test_the_scale_is_rounded_to_fp32(version: str) -> None:
    ones, scale = np.ones((1, 1), np.float32), 1 + 2.0**-24 + 2.0**-40
    assert Product(ones, ones, scale).part(0, 1).view(np.float32)[0] == 1 + 2.0**-23
    tiny = struct.unpack("<f", struct.pack("<I", 1))[0]
    assert Product(ones, ones, tiny).part(0, 1).tolist() == [1]


@built
def test_low_rank_in_a_thread_that_flushes() -> None:
    of = special_product(9, 4, 70)
    tiny = of._replace(scale=1e-40)
    expected = of.part(0, of.size), tiny.part(0, of.size)
    found = flushing(lambda: (of.part(0, of.size), tiny.part(0, of.size)))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, "F32")


@built
@on_x86
@pytest.mark.parametrize("mode", ROUNDING_MODES.values(), ids=ROUNDING_MODES)
def test_low_rank_in_a_thread_that_rounds_otherwise(mode: int) -> None:
    of = random_product(9, 4, 70, 1 / 3)
    expected = of.part(0, of.size)
    assert_same(rounding(mode, lambda: of.part(0, of.size)), expected, "F32")


@built
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((-1, 1, 1), (0, 0)),
        ((1, -1, 1), (0, 1)),
        ((1, 1, -1), (0, 0)),
        ((2, 1, 3), (-1, 1)),
        ((2, 1, 3), (0, -1)),
        ((2, 1, 3), (0, 7)),
        ((2, 1, 3), (6, 1)),
        ((2, 1, 3), (7, 0)),
        ((2, 1, 3), (1, 2**63 - 1)),
        ((2**40, 1, 2**40), (0, 1)),
        ((2**40, 2**40, 1), (0, 1)),
        ((1, 2**40, 2**40), (0, 1)),
        ((0, 1, 3), (0, 1)),
        ((2, 1, 0), (0, 1)),
    ],
)
def test_elements_that_are_not_in_the_matrix(shape: tuple[int, int, int], cut: tuple[int, int]) -> None:
    memory = bytearray(64)
    with pytest.raises(ValueError, match=r"elements \[first, first \+ n\) lie in a matrix"):
        convert._cpu.low_rank(bytes(64), bytes(64), 1.0, *shape, *cut, memory)
    assert not any(memory)


@built
@pytest.mark.parametrize("sizes", [(23, 48, 64), (24, 47, 64), (24, 48, 31)])
def test_factors_and_outputs_that_are_too_small(sizes: tuple[int, int, int]) -> None:
    left, right, out = (bytearray(size) for size in sizes)
    with pytest.raises(ValueError, match="buffer of"):
        convert._cpu.low_rank(left, right, 1.0, 2, 3, 4, 0, 8, out)
    convert._cpu.low_rank(bytes(24), bytes(48), 1.0, 2, 3, 4, 0, 8, bytearray(32))


@built
def test_nothing_of_nothing() -> None:
    for rows, rank, width in ((0, 3, 4), (4, 3, 0), (0, 0, 0)):
        convert._cpu.low_rank(bytes(64), bytes(64), 1.0, rows, rank, width, 0, 0, bytearray())
    out = np.full(6, 7.0, np.float32)
    convert._cpu.low_rank(b"", b"", 1.0, 2, 0, 3, 0, 6, out)
    assert out.tolist() == [0.0] * 6


# apply


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("beta", [1.0, 1.3, 0.5, 0.0, -2.0, 1e-40, 3e38])
def test_apply_is_two_rounded_operations(dtype: str, beta: float) -> None:
    rng = np.random.default_rng(4)
    bases = [*exact.specials(dtype), *rng.standard_normal(300).astype(KINDS[dtype]).view(BITS[dtype]).tolist()]
    deltas = [*exact.specials("F32"), *(rng.standard_normal(300) * 0.01).astype(np.float32).view(np.uint32).tolist()]
    pairs = [(bases[i % len(bases)], deltas[(7 * i) % len(deltas)]) for i in range(2500)]
    base = np.array([each for each, _ in pairs], BITS[dtype]).view(KINDS[dtype])
    delta = np.array([each for _, each in pairs], np.uint32).view(np.float32)
    out = np.empty_like(base)
    convert.add_delta(base, delta, beta, out)
    expected = [
        exact.encode(
            exact.add(
                exact.decode(x, dtype),
                exact.rounded(exact.multiply(exact.working(beta, dtype), exact.decode(d, "F32")), dtype),
            ),
            dtype,
        )
        for x, d in pairs
    ]
    assert_same(out.view(BITS[dtype]), np.array(expected, BITS[dtype]), dtype)


def test_apply_of_1_is_the_plain_sum() -> None:
    rng = np.random.default_rng(12)
    base, delta = rng.standard_normal((2, 999)).astype(np.float32)
    out = np.empty_like(base)
    convert.add_delta(base, delta, 1.0, out)
    assert not differing(out.view(np.uint32), (base + delta).view(np.uint32), "F32").size
    assert out.dtype == np.float32
    assert numerics.STORAGE["F32"] is np.float32
