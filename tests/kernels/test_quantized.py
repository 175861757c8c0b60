"""Every engine computes with the values of quantised elements, and gives the bits that it gives for these values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import quantized
import torch
from same import assert_same

from expo.errors import EngineError
from expo.kernels import convert, extrapolate, numerics, sweep
from expo.kernels.contract import QUANTIZED, EngineFunction, Operand, Scales, extrapolation, working_alpha

Array = Any
ALPHAS = (0.3, -1.25)
# (rows, columns, block, first element, elements): whole blocks, partial edges, rows, columns, one scale, and a start
# and an end inside rows.
PLACES = [
    (256, 384, (128, 128), 0, 256 * 384),
    (300, 577, (128, 128), 1234, 300 * 577 - 2000),
    (9, 200, (1, 200), 150, 1500),
    (64, 200, (64, 1), 0, 64 * 200),
    (40, 50, (40, 50), 7, 1990),
    (7, 4096, (1, 32), 5, 20_000),
    (70, 33, (32, 1), 3, 2000),
    (1, 1, (128, 128), 0, 1),
]
every_place = pytest.mark.parametrize("place", PLACES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", QUANTIZED)


def variants() -> list[str]:
    try:
        from expo.kernels import cpu
    except ImportError:
        return []
    return cpu.variants()


def engine_function(name: str) -> EngineFunction:
    if name == "numpy":
        return numerics.extrapolate
    from expo.kernels import cpu

    return partial(cpu.extrapolate, variant=name)


def make(place: tuple[Any, ...], dtype: str, seed: int = 0) -> tuple[Operand, Array]:
    """Return an operand with all codes and with scales from 2^-127 to NaN, and its values."""
    rows, columns, block, first, n = place
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), np.uint8)
    scales = rng.standard_normal((-(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
    special = np.array([2.0**-127, 3e38, np.nan, 0, -1.5, 2.0**-149], np.float32)
    scales.ravel()[: len(special)] = special[: scales.size]
    expected = quantized.values(codes, dtype, scales, block).ravel()[first : first + n]
    return Operand(codes.ravel()[first : first + n].copy(), dtype, Scales(scales, columns, block, first)), expected


def bits(array: Array) -> Array:
    return array.view(np.uint32 if array.itemsize == 4 else np.uint16)


def verify(engine: EngineFunction, operand: Operand, value: Array) -> None:
    """Compare an engine's results for a quantised sft, aligned or both with the definition's for the values."""
    rng = np.random.default_rng(1)
    plain = rng.integers(0, 2**16, value.size, np.uint16)
    alphas = [working_alpha(alpha) for alpha in ALPHAS]
    as_values, bf16 = Operand(value, "F32"), Operand(plain, "BF16")
    for sft, aligned, sft_value, aligned_value in (
        (operand, bf16, as_values, bf16),
        (bf16, operand, bf16, as_values),
        (operand, operand, as_values, as_values),
    ):
        kind = np.float32 if aligned is operand else np.uint16
        expected, outs = ([np.empty(value.size, kind) for _ in alphas] for _ in range(2))
        wanted = numerics.extrapolate(*extrapolation(sft_value, aligned_value, alphas), expected, True)
        found = engine(*extrapolation(sft, aligned, alphas), outs, True)
        for out, right in zip(outs, expected, strict=True):
            assert_same(bits(out), bits(right), aligned.value_dtype)
        assert wanted is not None
        assert found is not None
        assert (found.counts, found.max_abs_d) == (wanted.counts, wanted.max_abs_d)
        assert found[:2] == pytest.approx(wanted[:2], rel=1e-5)
        outs = [np.empty(value.size, kind)]
        assert engine(*extrapolation(sft, aligned, alphas[:1]), outs, False) is None
        assert_same(bits(outs[0]), bits(expected[0]), aligned.value_dtype)


@every_dtype
def test_numbers_of_all_codes(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = quantized.numbers(codes, dtype).astype(np.float32)
    assert_same(bits(numerics.NUMBERS[dtype]), bits(expected), "F32")


@every_place
@every_dtype
@pytest.mark.parametrize("name", ["numpy", *variants()])
def test_engines_of_the_host(name: str, dtype: str, place: tuple[Any, ...]) -> None:
    verify(engine_function(name), *make(place, dtype))


@every_place
@every_dtype
@pytest.mark.parametrize("built", [True, False])
def test_conversion(dtype: str, place: tuple[Any, ...], built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion that needs no engine gives the values, with the compiled code and without."""
    if not built:
        monkeypatch.setattr(convert, "_cpu", None)
    operand, value = make(place, dtype)
    out = np.empty_like(value)
    convert.dequantize(operand, out)
    assert_same(bits(out), bits(value), "F32")


BAD = {
    "too few rows": Scales(np.ones((1, 2), np.float32), 200, (1, 128)),
    "too few columns": Scales(np.ones((9, 1), np.float32), 200, (1, 128)),
    "too many columns": Scales(np.ones((9, 3), np.float32), 200, (1, 128)),
    "a start before the matrix": Scales(np.ones((9, 2), np.float32), 200, (1, 128), -1),
    "no columns": Scales(np.ones((9, 0), np.float32), 0, (1, 128)),
    "an end after the matrix": Scales(np.ones((4, 2), np.float32), 200, (1, 128), 500),
}


@pytest.mark.parametrize("scales", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["numpy", *variants()[:1]])
def test_scales_that_do_not_cover_the_elements(name: str, scales: Scales) -> None:
    operand, other, out = Operand(bytes(400), "F8_E4M3", scales), Operand(bytes(800), "BF16"), bytearray(b"x" * 800)
    with pytest.raises(ValueError, match="do not cover"):
        engine_function(name)(*extrapolation(operand, other, [0.5]), [out], False)
    assert set(out) == set(b"x")
    with pytest.raises(ValueError, match="do not cover"):
        convert.dequantize(operand, np.empty(400, np.float32))


def test_the_compiled_code_checks_scales_itself() -> None:
    _cpu = pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    values, out = np.ones(2, np.float32), np.empty(400, np.float32)
    right = (values, 1, 2, 200, 2, 128, 0)
    _cpu.dequantize(bytes(400), 3, 400, right, out)
    for place, wrong in ((1, 0), (1, 2**61), (2, 1), (2, 3), (3, 0), (4, 0), (5, 0), (6, -1), (6, 1), (6, 2**62)):
        with pytest.raises(ValueError, match=r"do not cover|bytes"):
            _cpu.dequantize(bytes(400), 3, 400, (*right[:place], wrong, *right[place + 1 :]), out)
    with pytest.raises(ValueError, match="bytes where"):
        _cpu.dequantize(bytes(400), 3, 400, (values[:1], *right[1:]), out)
    with pytest.raises(ValueError, match="need scales"):
        _cpu.extrapolate(bytes(4), 3, bytes(8), 0, 4, (bytearray(8),), (0.5,), False)
    for dtype in (2, 5):
        with pytest.raises(ValueError, match="dtype codes are 3 and 4"):
            _cpu.dequantize(bytes(400), dtype, 400, right, out)


def test_launchers_for_tensors_refuse_scales() -> None:
    """The kernels for tensors on a GPU take numbers, and the engine for memory of the host makes these."""
    plain, scaled = Operand.of_tensor(torch.zeros(4)), Operand(torch.zeros(4), "F8_E4M3", BAD["too few rows"])
    for launch in (extrapolate.launch, sweep.launch):
        with pytest.raises(EngineError, match="does not compute with quantised elements"):
            launch(*extrapolation(scaled, plain, torch.ones(1)), torch.zeros(1, 4))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip(
        "triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know"
    )
    from software_gpu import SoftwareGpu

    if extrapolate.interpreted():
        pytest.skip("the interpreter takes the GPU's place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with SoftwareGpu().active() as software:
            yield software


Dequantize = Callable[[Operand, Array], None]


@pytest.mark.parametrize("place", PLACES[1:5], ids=str)
@every_dtype
def test_kernel_on_a_gpu(gpu: Any, dtype: str, place: tuple[Any, ...]) -> None:
    """The kernel for a GPU, compiled and launched as for one, gives the values, and writes nothing beside them."""
    from expo.kernels import dequantize

    operand, value = make(place, dtype)
    assert operand.scales is not None
    codes, scales = torch.from_numpy(operand.memory), torch.from_numpy(operand.scales.values)
    fenced = torch.full((value.size + 64,), 7.0)
    before = len(gpu.launches)
    dequantize.launch(operand._replace(memory=codes), scales, fenced[32:-32])
    assert [name for name, _ in gpu.launches[before:]] == ["dequantize"]
    assert_same(bits(fenced[32:-32].numpy()), bits(value), "F32")
    assert (fenced[:32] == 7).all()
    assert (fenced[-32:] == 7).all()


def test_one_launch_has_a_limit() -> None:
    from expo.kernels import dequantize

    scales = Scales(np.ones((1 << 17, 128), np.float32), 128 * 128, (1, 128), 2**31 - 1500)
    with pytest.raises(ValueError, match="one launch"):
        dequantize.launch(
            Operand(torch.zeros(500, dtype=torch.uint8), "F8_E4M3", scales), torch.empty(0), torch.empty(500)
        )
