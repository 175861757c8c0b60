"""These tests run the Triton kernel: it must give the bits of the numerics contract and access only its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import exact
import numpy as np
import pytest
import quantized
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from engine_calls import run_engine
from same import assert_same

import expo
from expo.demo import ALIGNED, SFT
from expo.dtypes import ITEMSIZE, torch_dtypes
from expo.kernels import extrapolate, host, numerics, sweep, whole_model
from expo.kernels.contract import (
    QUANTIZED,
    Operand,
    Scales,
    Statistics,
    Term,
    extrapolation,
    tensor_extrapolation,
    working_alpha,
)

NARROW = ("BF16", "F16", "F32")
PAIRS = list(product(NARROW, NARROW))  # (sft, aligned)
WIDE_PAIRS = [("F64", "BF16"), ("F64", "F16"), ("BF16", "F64"), ("F64", "F64")]
ALPHAS = (0.3, 0.5, 1.0, -0.7, 2.5, 25.0, 1e-30, 3e38)
BLOCK = extrapolate.PROGRAM_ELEMENTS
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
POISON, GUARD = 0xA5, 32  # the byte that fills outputs; the number of elements beside a tensor that must keep it


def pack(bits: Sequence[int], dtype: str) -> bytes:
    return b"".join(b.to_bytes(ITEMSIZE[dtype], "little") for b in bits)


def reference(sft: bytes, aligned: bytes, pair: tuple[str, str], alpha: float) -> Any:
    out = bytearray(len(aligned))
    run_engine(numerics.extrapolate, sft, aligned, pair, [out], [alpha])
    return np.frombuffer(out, BITS[pair[1]])


def random_bits(seed: int, pair: tuple[str, str], n: int) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(seed)
    return rng.bytes(n * ITEMSIZE[pair[0]]), rng.bytes(n * ITEMSIZE[pair[1]])


def bits_of(tensor: torch.Tensor, dtype: str) -> Any:
    return tensor.view(torch.uint8).numpy().view(BITS[dtype])


class Fenced(NamedTuple):
    """A tensor in the middle of poisoned memory, `shift` elements past an aligned address."""

    memory: torch.Tensor
    tensor: torch.Tensor

    @classmethod
    def of(cls, data: bytes, dtype: str, shift: int = 0) -> Fenced:
        item = ITEMSIZE[dtype]
        n, start = len(data) // item, GUARD + shift
        memory = torch.full(((start + n + GUARD) * item,), POISON, dtype=torch.uint8)
        memory[start * item : (start + n) * item] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[
            : len(data)
        ]
        return cls(memory, memory.view(torch_dtypes()[dtype])[start : start + n])

    def guards_stand(self) -> bool:
        start = self.tensor.data_ptr() - self.memory.data_ptr()
        size = self.tensor.numel() * self.tensor.element_size()
        around = torch.cat([self.memory[:start], self.memory[start + size :]])
        return bool((around == POISON).all())


class Fence:
    """This object subtracts `moved` bytes from each address, and checks the address before a kernel accesses it."""

    def __init__(self) -> None:
        self.readable: list[range] = []
        self.writable: list[range] = []
        self.moved: dict[Any, int] = {}

    def check(self, ptrs: Any, mask: Any, allowed: Sequence[range]) -> Any:
        element = ptrs.get_element_ty()
        addresses = ptrs.data - np.uint64(self.moved.get(element, 0))
        touched = addresses[mask.data].astype(np.int64)
        inside = np.zeros(touched.shape, bool)
        for region in allowed:
            inside |= (
                (touched >= region.start) & (touched < region.stop) & ((touched - region.start) % region.step == 0)
            )
        assert inside.all(), f"an access of {element} outside its tensor"
        return interpreter.TensorHandle(addresses, ptrs.dtype)


def extent(tensor: torch.Tensor) -> range:
    """Return the addresses of the elements."""
    step = tensor.element_size()
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * step, step)


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Fence:
    fence = Fence()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, fence.check(ptrs, mask, fence.readable), mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, fence.check(ptrs, mask, fence.writable), value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return fence


def launch_fenced(
    fence: Fence, sft: bytes, aligned: bytes, pair: tuple[str, str], alpha: float = 0.3, shift: int = 0
) -> Any:
    """Return the kernel's output bits; every access is checked, and every guard element must be unchanged."""
    s, a = Fenced.of(sft, pair[0], shift), Fenced.of(aligned, pair[1], shift)
    out = Fenced.of(bytes([POISON]) * len(aligned), pair[1], shift)
    fence.readable = [extent(s.tensor), extent(a.tensor)]
    fence.writable = [extent(out.tensor)]
    extrapolate.launch(*tensor_extrapolation(s.tensor, a.tensor, (working_alpha(alpha, *pair),)), [out.tensor])
    assert all(each.guards_stand() for each in (s, a, out))
    assert s.tensor.view(torch.uint8).numpy().tobytes() == sft
    assert a.tensor.view(torch.uint8).numpy().tobytes() == aligned
    return bits_of(out.tensor, pair[1])


def test_the_interpreter_still_truncates(unpatched: Callable[..., Any]) -> None:
    """The interpreter's downcast truncates; if this test fails, Triton has fixed it, and conftest.py needs no patch."""
    above_the_tie = np.array([1 + 2.0**-8 + 2.0**-20], np.float32)
    assert unpatched(above_the_tie, tl.float32, tl.bfloat16, None).tolist() == [0x3F80]
    assert interpreter._convert_float(above_the_tie, tl.float32, tl.bfloat16, None).tolist() == [0x3F81]


def test_the_patch_rounds_as_exact_arithmetic() -> None:
    bits = exact.specials("F32")
    data = np.array(bits, np.uint32).view(np.float32)
    rounded = interpreter._convert_float(data, tl.float32, tl.bfloat16, None)
    expected = [exact.encode(exact.decode(b, "F32"), "BF16") for b in bits]
    assert_same(rounded, np.array(expected, np.uint16), "BF16")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_special_values(fence: Fence, pair: tuple[str, str], alpha: float) -> None:
    """The kernel gives the right bits for every combination of the two dtypes' special values."""
    both = list(product(exact.specials(pair[0]), exact.specials(pair[1])))
    sft, aligned = pack([s for s, _ in both], pair[0]), pack([a for _, a in both], pair[1])
    out = launch_fenced(fence, sft, aligned, pair, alpha)
    assert_same(out, reference(sft, aligned, pair, working_alpha(alpha)), pair[1])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_length(fence: Fence, pair: tuple[str, str], shift: int) -> None:
    """Lengths around the tail of 8 lanes and around blocks are right, at an aligned address and one element past it."""
    for n in (*range(41), *range(BLOCK - 9, BLOCK + 10), 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1):
        sft, aligned = random_bits(n, pair, n)
        out = launch_fenced(fence, sft, aligned, pair, shift=shift)
        assert_same(out, reference(sft, aligned, pair, working_alpha(0.3)), pair[1])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_in_place(pair: tuple[str, str], shift: int) -> None:
    """The output may be aligned's memory, or sft's if the dtypes are equal."""
    n, alpha = 3 * BLOCK + 13, working_alpha(0.3)
    sft, aligned = random_bits(1, pair, n)
    expected = reference(sft, aligned, pair, alpha)
    for place in ("aligned", "sft") if pair[0] == pair[1] else ("aligned",):
        s, a = Fenced.of(sft, pair[0], shift), Fenced.of(aligned, pair[1], shift)
        out = a if place == "aligned" else s
        extrapolate.launch(*tensor_extrapolation(s.tensor, a.tensor, (alpha,)), [out.tensor])
        assert_same(bits_of(out.tensor, pair[1]), expected, pair[1])
        assert s.guards_stand()
        assert a.guards_stand()


@pytest.mark.parametrize("rest", [5, 8, BLOCK, BLOCK + 3])
def test_offsets_past_two_to_the_31(fence: Fence, monkeypatch: pytest.MonkeyPatch, rest: int) -> None:
    """The last programs over more than 2^31 elements are right; their addresses are moved back onto small tensors."""
    blocks = 2**31 // BLOCK + 3
    sft, aligned = random_bits(2, ("BF16", "BF16"), rest)
    s, a, out = (Fenced.of(data, "BF16") for data in (sft, aligned, bytes([POISON]) * 2 * rest))
    fence.readable, fence.writable = [extent(s.tensor), extent(a.tensor)], [extent(out.tensor)]
    fence.moved = {tl.bfloat16: 2 * blocks * BLOCK}
    builder = interpreter.InterpreterBuilder
    near = builder.create_get_program_id

    def far(self: Any, axis: int) -> Any:
        handle = near(self, axis)
        return interpreter.TensorHandle(handle.data + np.int32(blocks), handle.dtype)

    monkeypatch.setattr(builder, "create_get_program_id", far)
    alpha, n = working_alpha(0.3), blocks * BLOCK + rest
    extrapolate.extrapolate[(-(-rest // BLOCK),)](s.tensor, a.tensor, out.tensor, n, alpha, BLOCK=BLOCK, PTX=False)
    assert_same(bits_of(out.tensor, "BF16"), reference(sft, aligned, ("BF16", "BF16"), alpha), "BF16")
    assert out.guards_stand()


# Several alphas, and statistics


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("pair", [("BF16", "BF16"), ("F32", "F16"), ("F16", "F32")], ids="-".join)
def test_sweep(fence: Fence, pair: tuple[str, str], measured: bool) -> None:
    """A sweep is right in lengths around tails, parts and blocks; it writes every row, and nothing between outputs."""
    alphas = torch.tensor([0.3, -2.5, 1.0])
    block = sweep.PROGRAM_ELEMENTS
    for n in (0, 1, 7, 8, 9, 2047, 2049, block - 1, block, block + 1, 2 * block + 13):
        sft, aligned = random_bits(n, pair, n)
        s, a = Fenced.of(sft, pair[0], n % 2), Fenced.of(aligned, pair[1], n % 2)
        outs = Fenced.of(bytes([POISON]) * (3 * (n + 5) * ITEMSIZE[pair[1]]), pair[1])
        rows = outs.tensor.view(3, n + 5)[:, :n]
        partials = sweep.Partials.empty(n, 3, alphas.device) if measured else None
        written = [*rows, *(partials or ())]
        for each in partials or ():
            each.view(torch.uint8).fill_(POISON)
        fence.readable, fence.writable = [extent(x) for x in (s.tensor, a.tensor, alphas)], [extent(x) for x in written]
        sweep.launch(*tensor_extrapolation(s.tensor, a.tensor, alphas), rows, partials)
        assert outs.guards_stand()
        expected = [bytearray(len(aligned)) for _ in alphas]
        moved = run_engine(numerics.extrapolate, sft, aligned, pair, expected, alphas.tolist(), True)
        for row, right in zip(rows, expected, strict=True):
            assert_same(bits_of(row.contiguous(), pair[1]), np.frombuffer(right, BITS[pair[1]]), pair[1])
        if partials is not None and moved is not None:
            poison = torch.full((1,), POISON, dtype=torch.uint8).expand(4).contiguous().view(torch.int32)
            assert not any((each.view(torch.int32) == poison).any() for each in partials)
            found = sweep.statistics(partials)
            assert (found.counts, found.max_abs_d) == (moved.counts, moved.max_abs_d)


# A whole model


@pytest.mark.parametrize("place", ["apart", "aligned", "sft"])
def test_whole_model(fence: Fence, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A whole model is right, with tensors of all dtypes, some at odd addresses, one longer than a row of the table."""
    monkeypatch.setattr(whole_model, "SEGMENT", 2)  # leaves fewer programs without work, which the interpreter runs too
    long = whole_model.SEGMENT * BLOCK + BLOCK + 3
    cases = [(pair, n, shift) for pair in PAIRS for n, shift in ((0, 0), (1, 1), (9, 0), (BLOCK + 1, 1), (BLOCK, 0))]
    cases += [(("BF16", "BF16"), long, 0)]
    triples, expected, outs = [], [], []
    for i, (pair, n, shift) in enumerate(cases):
        sft, aligned = random_bits(i, pair, n)
        s, a = Fenced.of(sft, pair[0], shift), Fenced.of(aligned, pair[1], shift)
        apart = place == "apart" or (place == "sft" and pair[0] != pair[1])
        out = Fenced.of(bytes([POISON]) * len(aligned), pair[1]) if apart else a if place == "aligned" else s
        triples.append((s.tensor, a.tensor, out.tensor))
        outs.append((out, pair[1]))
        expected.append(reference(sft, aligned, pair, working_alpha(0.3)))
    table = whole_model.Table(*zip(*triples, strict=True))
    fence.readable = [extent(x) for triple in triples for x in triple[:2]] + [
        extent(group.table) for group in table.groups
    ]
    fence.writable = [extent(triple[2]) for triple in triples]
    table.launch(working_alpha(0.3))
    for (out, dtype), right in zip(outs, expected, strict=True):
        assert_same(bits_of(out.tensor, dtype), right, dtype)
        assert out.guards_stand()


# The host engine, which has the contract's signature


def by_host_engine(
    sft: bytes, aligned: bytes, pair: tuple[str, str], alphas: Sequence[float], measure: bool
) -> tuple[Statistics | None, list[bytearray]]:
    engine = host.HostEngine("cuda")
    outs = [bytearray([POISON]) * len(aligned) for _ in alphas]
    return run_engine(engine, sft, aligned, pair, outs, alphas, measure), outs


@pytest.mark.parametrize("n", [0, 1, 1000, BLOCK + 77])
@pytest.mark.parametrize("pair", PAIRS + WIDE_PAIRS, ids="-".join)
def test_host_engine(pair: tuple[str, str], n: int) -> None:
    """The host engine gives NumPy's outputs and statistics, for weights with infinities and NaNs among them."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal(n) * 0.02
    s = a + rng.standard_normal(n) * 0.0005
    s[::5] = a[::5]
    a[7::50], s[9::60] = np.inf, np.nan
    sft, aligned = (
        torch.from_numpy(x).to(torch_dtypes()[dtype]).view(torch.uint8).numpy().tobytes() if n else b""
        for x, dtype in ((s, pair[0]), (a, pair[1]))
    )
    alphas = [working_alpha(alpha, *pair) for alpha in (0.3, 1.0, -0.7)]
    statistics, outs = by_host_engine(sft, aligned, pair, alphas, True)
    expected = [bytearray(len(aligned)) for _ in alphas]
    plain = run_engine(numerics.extrapolate, sft, aligned, pair, expected, alphas, True)
    for out, right in zip(outs, expected, strict=True):
        assert_same(np.frombuffer(out, BITS[pair[1]]), np.frombuffer(right, BITS[pair[1]]), pair[1])
    assert statistics is not None
    assert plain is not None
    assert statistics.counts == plain.counts
    assert statistics.max_abs_d == plain.max_abs_d
    assert statistics[:2] == pytest.approx(plain[:2], rel=1e-5, abs=0)


def test_host_engine_measures_only_when_asked() -> None:
    statistics, outs = by_host_engine(pack([0x3F80], "BF16"), pack([0x4000], "BF16"), ("BF16", "BF16"), [0.5], False)
    assert statistics is None
    assert outs == [bytearray(pack([0x4020], "BF16"))]


def test_host_engine_with_memory_longer_than_the_anchor() -> None:
    """Only the anchor's length determines how many elements are computed, as for every engine."""
    sft, aligned, out = pack([0x3F80] * 11, "BF16"), pack([0x4000] * 9, "BF16"), bytearray([POISON]) * 18
    run_engine(host.HostEngine("cuda"), sft, aligned[:10], ("BF16", "BF16"), [out], [0.5])
    assert out == pack([0x4020] * 5, "BF16") + bytes([POISON]) * 8


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_other_combinations_are_refused(dtype: str) -> None:
    """The host engine and both launchers compute the term of ExPO and nothing else."""
    o, x = (Operand(bytes(16), dtype) for _ in range(2))
    engine, out = host.HostEngine("cuda"), bytearray([POISON]) * 16
    for anchor, terms in ((o, []), (o, [Term([1.0], o, x)] * 2), (x, [Term([1.0], o, x)])):
        with pytest.raises(expo.EngineError, match="the engine triton computes only aligned"):
            engine(anchor, terms, [out], False)
    assert set(out) == {POISON}
    t = Operand.of_tensor(torch.zeros(4))
    for launch in (extrapolate.launch, sweep.launch):
        with pytest.raises(expo.EngineError, match="and got 2 terms"):
            launch(t, [Term(torch.ones(1), t, t)] * 2, torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantised_elements(dtype: str) -> None:
    """The host engine gives the bits that the definition gives for the values of quantised elements."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (300, 130), np.uint8), rng.standard_normal((3, 2)).astype(np.float32)
    value = quantized.values(codes, dtype, scales, (128, 128)).ravel()[77:]
    operand = Operand(codes.ravel()[77:].copy(), dtype, Scales(scales, 130, (128, 128), 77))
    other = Operand(rng.integers(0, 2**16, value.size, np.uint16), "BF16")
    for sft, aligned, plain in (
        (operand, other, extrapolation(Operand(value, "F32"), other, [0.3])),
        (other, operand, extrapolation(other, Operand(value, "F32"), [0.3])),
    ):
        out, expected = (bytearray([POISON]) * (value.size * ITEMSIZE[aligned.value_dtype]) for _ in range(2))
        found = host.HostEngine("cuda")(*extrapolation(sft, aligned, [0.3]), [out], True)
        wanted = numerics.extrapolate(*plain, [expected], True)
        assert found is not None
        assert wanted is not None
        assert found.counts == wanted.counts
        kind = BITS[aligned.value_dtype]
        assert_same(np.frombuffer(out, kind), np.frombuffer(expected, kind), aligned.value_dtype)


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
def test_whole_merge(tmp_path: Path, engine: str) -> None:
    """A merge of the demo pair gives files with the same bytes as a merge by an engine on the CPU."""
    if engine == "cpu":
        pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "triton", engine="triton")
    expo.merge(SFT, ALIGNED, 0.3, tmp_path / engine, engine=engine)
    assert merged.engine == "triton"
    ours, theirs = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("triton", engine))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert tensors
    assert all(ours[name] != (ALIGNED / name).read_bytes() for name in tensors)
