"""These tests check expo.extrapolate() for arrays and tensors: its bits, and its refusals, which name both values."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cpu_time import at_most
from engine_calls import run_engine

import expo
import expo.tensors.arrays
from expo.execution.engines import choose
from expo.kernels import numerics
from expo.kernels.contract import working_alpha

ROOT = Path(__file__).parents[2]
NUMPY: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PAIRS = list(itertools.product(NUMPY, repeat=2))
LIBRARIES = ["numpy", "torch"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5,), (7, 11), (2, 3, 4), (1000,)]


def make(library: str, dtype: str, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Any:
    """Return an array or tensor of normal numbers."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    if library == "torch":
        return torch.tensor(values).to(TORCH[dtype])
    return np.asarray(values).astype(NUMPY[dtype])


def raw(x: Any) -> bytes:
    """Return the bytes of the elements, in the order of their indices."""
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else np.empty(0)
    return bytes(np.ascontiguousarray(x).tobytes())


def name_of(x: Any) -> str:
    kinds: dict[str, Any] = (
        TORCH if isinstance(x, torch.Tensor) else {key: np.dtype(kind) for key, kind in NUMPY.items()}
    )
    return next(name for name, kind in kinds.items() if kind == x.dtype)


def expected(sft: Any, aligned: Any, alpha: float) -> bytes:
    """Return the bytes that NumPy's engine gives, or a copy of aligned's for alpha 0."""
    data, s, a = raw(aligned), name_of(sft), name_of(aligned)
    if alpha == 0 or not data:
        return data
    out = bytearray(len(data))
    run_engine(numerics.extrapolate, raw(sft), data, (s, a), [out], [working_alpha(alpha, s, a)])
    return bytes(out)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("s", "a"), PAIRS)
def test_every_pair_of_dtypes_has_the_bits_of_the_contract(library: str, s: str, a: str) -> None:
    for shape, alpha in itertools.product(SHAPES, (0.3, -1.0, 0.0)):
        sft, aligned = make(library, s, shape, 1), make(library, a, shape, 2)
        before = raw(sft), raw(aligned)
        found = expo.extrapolate(sft, aligned, alpha)
        assert type(found) is type(aligned)
        assert (found.dtype, tuple(found.shape)) == (aligned.dtype, shape)
        assert raw(found) == expected(sft, aligned, alpha), (shape, alpha)
        assert (raw(sft), raw(aligned)) == before


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("s", "a"), PAIRS)
def test_out_may_be_another_or_aligned_itself(library: str, s: str, a: str) -> None:
    sft, aligned = make(library, s, (9, 5), 1), make(library, a, (9, 5), 2)
    bits = expected(sft, aligned, 0.3)
    other = make(library, a, (9, 5), 3)
    assert expo.extrapolate(sft, aligned, 0.3, out=other) is other
    assert raw(other) == bits
    assert expo.extrapolate(sft, aligned, 0.3, out=aligned) is aligned
    assert raw(aligned) == bits


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", NUMPY)
def test_out_may_be_sft_itself_and_both_may_be_one(library: str, dtype: str) -> None:
    sft, aligned = make(library, dtype, (9, 5), 1), make(library, dtype, (9, 5), 2)
    bits = expected(sft, aligned, 0.3)
    assert expo.extrapolate(sft, aligned, 0.3, out=sft) is sft
    assert raw(sft) == bits
    assert raw(expo.extrapolate(aligned, aligned, 0.3, out=aligned)) == expected(aligned, aligned, 0.3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=3)))
def test_memory_need_not_be_contiguous(library: str, which: tuple[bool, bool, bool]) -> None:
    sft, aligned, out = (
        make(library, "BF16", (8, 6), seed)[::2, 1::2] if strided else make(library, "BF16", (4, 3), seed)
        for seed, strided in enumerate(which)
    )
    bits = expected(sft, aligned, 0.3)
    assert raw(expo.extrapolate(sft, aligned, 0.3)) == bits
    assert expo.extrapolate(sft, aligned, 0.3, out=out) is out
    assert raw(out) == bits


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_transposed_result_and_in_place_through_a_view(library: str) -> None:
    sft, aligned = make(library, "F32", (4, 6), 1).T, make(library, "F32", (4, 6), 2).T
    bits = expected(sft, aligned, 0.3)
    assert raw(expo.extrapolate(sft, aligned, 0.3)) == bits
    whole = make(library, "F32", (6, 8), 3)
    view = whole[:, ::2]
    view[...] = aligned
    rest = raw(whole[:, 1::2])
    expo.extrapolate(sft, view, 0.3, out=view)
    assert raw(view) == bits
    assert raw(whole[:, 1::2]) == rest


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("alpha", [0, 0.0, -0.0, 1e-60])
def test_alpha_0_copies_every_bit(dtype: str, alpha: float) -> None:
    odd = np.array([0x8000, 0x7FC1, 0xFFFF, 0x7F81, 0x0001, 0xFF80, 0x7E01, 0x7C01], np.uint16).view(NUMPY[dtype])
    if dtype == "F64" and alpha:
        pytest.skip("1e-60 is 0 in fp32, not in fp64")
    sft = np.ones_like(odd)
    assert raw(expo.extrapolate(sft, odd, alpha)) == raw(odd)
    assert raw(expo.extrapolate(sft[::-1], odd[::-1], alpha)) == raw(odd[::-1])
    words = torch.tensor(odd.view(np.int16)).view(TORCH[dtype])
    assert raw(expo.extrapolate(torch.ones_like(words), words, alpha)) == raw(odd)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("s", "a"), [("BF16", "BF16"), ("F16", "F32"), ("F32", "F16"), ("F64", "BF16")])
def test_threads_share_the_work_and_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, library: str, s: str, a: str
) -> None:
    monkeypatch.setattr(expo.tensors.arrays, "cpu_count", lambda: 5)
    for split, n in itertools.product((1, 7, 64), (6, 7, 8, 127, 1000)):
        monkeypatch.setattr(expo.tensors.arrays, "SPLIT_ELEMENTS", split)
        sft, aligned = make(library, s, (n,), 1), make(library, a, (n,), 2)
        assert raw(expo.extrapolate(sft, aligned, 0.3)) == expected(sft, aligned, 0.3), (split, n)


@pytest.fixture
def without_compiled_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.tensors.arrays, "_cpu_engine", lambda: choose("numpy"))


@pytest.mark.usefixtures("without_compiled_engine")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("s", "a"), PAIRS)
def test_numpy_takes_over_where_the_compiled_engine_is_missing(library: str, s: str, a: str) -> None:
    for shape in SHAPES:
        sft, aligned = make(library, s, shape, 1), make(library, a, shape, 2)
        assert raw(expo.extrapolate(sft, aligned, 0.3)) == expected(sft, aligned, 0.3)


# --- the floating-point mode ------------------------------------------------------------------------------------------


@pytest.fixture
def flushing() -> Iterator[None]:
    """Make this thread flush subnormals by torch.set_flush_denormal, which affects NumPy too."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


TINY = {"BF16": (1, 0x80), "F16": (1, 0x400), "F32": (1, 0x800000)}  # bits of the smallest subnormal and normal numbers


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("split", [4, 1 << 22])
def test_flushing_does_not_reach_the_compiled_engine(
    monkeypatch: pytest.MonkeyPatch, dtype: str, split: int, request: pytest.FixtureRequest
) -> None:
    if choose().name != "cpu":
        pytest.skip("the compiled engine is not built")
    monkeypatch.setattr(expo.tensors.arrays, "SPLIT_ELEMENTS", split)
    width = np.uint32 if dtype == "F32" else np.uint16
    aligned = np.arange(1, 2 * TINY[dtype][1], max(TINY[dtype][1] // 64, 1)).astype(width).view(NUMPY[dtype])
    sft = np.zeros_like(aligned)
    bits = expected(sft, aligned, 0.5)
    assert bits != raw(aligned)
    request.getfixturevalue("flushing")
    assert raw(expo.extrapolate(sft, aligned, 0.5)) == bits
    assert flushes(), "the caller's mode was not restored"


def flushes() -> bool:
    return bool(np.array([1], np.uint32).view(np.float32)[0] * np.float32(1) == 0)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("split", [4, 1 << 22])
def test_numpy_refuses_a_thread_that_flushes(monkeypatch: pytest.MonkeyPatch, library: str, split: int) -> None:
    """NumPy computes every F64 tensor, and NumPy's refusal reaches the caller, also from several threads."""
    monkeypatch.setattr(expo.tensors.arrays, "SPLIT_ELEMENTS", split)
    monkeypatch.setattr(expo.tensors.arrays, "cpu_count", lambda: 2)
    x = make(library, "F64", (20,), 1)
    with pytest.raises(expo.EngineError, match=r"flushes subnormals.*set_flush_denormal\(False\)"):
        expo.extrapolate(x, x, 0.3)


IMPORTED_WHILE_FLUSHING = """
import torch
torch.set_flush_denormal(True)
from expo.kernels import numerics
torch.set_flush_denormal(False)
numerics.check_floating_point_mode()
"""


def test_the_check_holds_whatever_the_mode_was_when_it_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED_WHILE_FLUSHING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- torch ------------------------------------------------------------------------------------------------------------


def test_parameters_that_require_grad() -> None:
    sft, aligned = (torch.nn.Parameter(make("torch", "BF16", (4, 3), seed)) for seed in (1, 2))
    found = expo.extrapolate(sft, aligned, 0.3)
    assert not found.requires_grad
    assert type(found) is torch.Tensor
    assert raw(found) == expected(sft, aligned, 0.3)
    bits = expected(sft, aligned, 0.3)
    assert expo.extrapolate(sft, aligned, 0.3, out=aligned) is aligned
    assert aligned.requires_grad
    assert raw(aligned) == bits
    strided = torch.nn.Parameter(make("torch", "F32", (4, 3), 3))
    assert raw(expo.extrapolate(strided.T, strided.T, 0.0)) == raw(strided.T)


def test_inference_mode() -> None:
    with torch.inference_mode():
        sft, aligned = make("torch", "BF16", (4, 3), 1), make("torch", "BF16", (4, 3), 2)
        assert raw(expo.extrapolate(sft, aligned, 0.3, out=aligned)) == raw(aligned)


def test_a_negative_view_counts_as_what_it_shows() -> None:
    """A tensor with torch's lazy negation counts with the values that it shows; its memory holds the opposite ones."""
    shown = torch._neg_view(torch.ones(4))
    assert shown.tolist() == [-1] * 4
    assert expo.extrapolate(torch.zeros(4), shown, 0.5).tolist() == [-1.5] * 4
    assert expo.extrapolate(shown, torch.zeros(4), 0.5).tolist() == [0.5] * 4


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "alpha", [math.nan, math.inf, -math.inf, 1e39, 10**400, "0.3", None, [0.3], 1j], ids=lambda x: repr(x)[:12]
)
@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_an_alpha_that_makes_no_sense(library: str, alpha: Any, dtype: str) -> None:
    x = make(library, dtype, (3,), 1)
    with pytest.raises(expo.UsageError, match="alpha must be a number that is finite in float32, got"):
        expo.extrapolate(x, x, alpha)


@pytest.mark.parametrize("library", LIBRARIES)
def test_shapes_that_differ(library: str) -> None:
    x, y = make(library, "F32", (3, 4), 1), make(library, "F32", (4, 3), 1)
    for sft, aligned, out in ((x, y, None), (x, x, y), (y[:1], y, None)):
        with pytest.raises(expo.UsageError, match=r"shapes differ: sft \(\d, \d\), aligned \(\d, \d\), out \(\d, \d\)"):
            expo.extrapolate(sft, aligned, 0.3, out=out)


@pytest.mark.parametrize(
    ("library", "one", "other"),
    [("numpy", "float32", "float64"), ("torch", "torch.float32", "torch.float64")],
)
def test_an_out_of_another_dtype(library: str, one: str, other: str) -> None:
    x = make(library, "F32", (3,), 1)
    with pytest.raises(expo.UsageError, match=f"out is {other}, but the result has aligned's dtype {one}"):
        expo.extrapolate(x, x, 0.3, out=make(library, "F64", (3,), 1))


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.bool_, np.complex64, np.longdouble, ">f4", "U3", object])
def test_numpy_dtypes_that_are_no_weights(kind: Any) -> None:
    x, fine = np.zeros(3, kind), np.zeros(3, np.float32)
    for sft, aligned in ((x, x), (x, fine), (fine, x)):
        with pytest.raises(expo.UsageError, match=r"dtypes must be bf16, fp16, fp32 or fp64, got sft .* and aligned"):
            expo.extrapolate(sft, aligned, 0.3)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_torch_dtypes_that_are_no_weights(kind: torch.dtype) -> None:
    x, fine = torch.zeros(3, dtype=kind), torch.zeros(3)
    for sft, aligned in ((x, x), (x, fine), (fine, x)):
        with pytest.raises(expo.UsageError, match=rf"got sft .*{sft.dtype} and aligned {aligned.dtype}"):
            expo.extrapolate(sft, aligned, 0.3)


def test_tensors_on_different_devices() -> None:
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    for sft, aligned, out in ((here, there, None), (there, here, None), (here, here, there)):
        with pytest.raises(
            expo.UsageError, match=r"devices differ: sft (cpu|meta), aligned (cpu|meta), out (cpu|meta)"
        ):
            expo.extrapolate(sft, aligned, 0.3, out=out)


@pytest.mark.parametrize(
    ("sft", "aligned", "out"),
    [
        (np.zeros(3), torch.zeros(3), None),
        (torch.zeros(3), np.zeros(3), None),
        (np.zeros(3), np.zeros(3), torch.zeros(3)),
        (torch.zeros(3), torch.zeros(3), np.zeros(3)),
        ([1.0], [2.0], None),
        ([[1.0], [2.0, 3.0]], [[1.0], [2.0, 3.0]], None),
        (1.0, 2.0, None),
        (None, None, None),
        (np.zeros(3), "weights", None),
    ],
)
def test_what_is_neither_array_nor_tensor_or_a_mix_of_both(sft: Any, aligned: Any, out: Any) -> None:
    with pytest.raises(expo.UsageError, match=r"must (all )?be"):
        expo.extrapolate(sft, aligned, 0.3, out=out)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("which", ["sft", "aligned"])
@pytest.mark.parametrize("shift", [-1, 1, 9])
def test_an_out_that_overlaps_in_part(library: str, which: str, shift: int) -> None:
    memory, other = make(library, "F32", (30,), 1), make(library, "F32", (10,), 2)
    near, out = memory[10:20], memory[10 + shift : 20 + shift]
    sft, aligned = (near, other) if which == "sft" else (other, near)
    before = raw(memory)
    with pytest.raises(expo.UsageError, match=f"out overlaps {which} in part; out may be the same memory"):
        expo.extrapolate(sft, aligned, 0.3, out=out)
    assert raw(memory) == before


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("step", [1, 2])
def test_any_overlap_is_refused_or_right(library: str, alpha: float, step: int) -> None:
    memory, other = make(library, "F32", (40,), 1), make(library, "F32", (10,), 2)
    aligned, out = memory[: 10 * step : step], memory[step : 11 * step : step]
    bits = expected(other, aligned, alpha)
    try:
        expo.extrapolate(other, aligned, alpha, out=out)
    except expo.UsageError:
        return
    assert raw(out) == bits


@pytest.mark.parametrize("library", LIBRARIES)
def test_neighbours_in_one_memory_do_not_overlap(library: str) -> None:
    memory = make(library, "F32", (30,), 1)
    bits = expected(memory[:10], memory[20:], 0.3)
    assert raw(expo.extrapolate(memory[:10], memory[20:], 0.3, out=memory[10:20])) == bits


def test_an_sft_of_another_width_under_out() -> None:
    memory = torch.zeros(16, dtype=torch.float32)
    with pytest.raises(expo.UsageError, match="out overlaps sft in part"):
        expo.extrapolate(memory[:8], torch.zeros(8).bfloat16(), 0.3, out=memory.view(torch.bfloat16)[:8])


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_an_out_that_cannot_be_written(alpha: float) -> None:
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(expo.UsageError, match="out is read-only"):
        expo.extrapolate(np.zeros(3, np.float32), np.zeros(3, np.float32), alpha, out=frozen)
    with pytest.raises(expo.UsageError, match="out"):
        expo.extrapolate(torch.zeros(3), torch.zeros(3), alpha, out=torch.zeros(1).expand(3))


def test_sparse_tensors_are_refused() -> None:
    x = torch.eye(3).to_sparse()
    with pytest.raises(expo.UsageError, match="sparse"):
        expo.extrapolate(x, x, 0.3)


# --- tensors without memory of their own ------------------------------------------------------------------------------

WITHOUT_MEMORY = {
    "meta": "def make(): return torch.ones(4, device='meta')",
    "fake": """
from torch._subclasses.fake_tensor import FakeTensorMode
def make():
    with FakeTensorMode():
        return torch.ones(4)
""",
    "wrapper": """
class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner): return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
    def __init__(self, inner): self.inner = inner
    def data_ptr(self): return self.inner.data_ptr()
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [each.inner if isinstance(each, Wrapper) else each for each in args]
        return Wrapper(function(*args, **kwargs or {}))
def make(): return Wrapper(torch.ones(4, dtype=torch.int8).bfloat16())
""",
    "TwoTensor": """
from torch.testing._internal.two_tensor import TwoTensor
def make(): return TwoTensor(torch.ones(4), torch.ones(4))
""",
    "freed": """
def make():
    x = torch.ones(8)[4:]
    x.untyped_storage().resize_(0)
    return x
""",
    "functional": "def make(): return torch._to_functional_tensor(torch.ones(4))",
}
ADVICE = {
    "meta": "a shape and no numbers",
    "fake": "a shape and no numbers",
    "wrapper": r"such as its .dequantize\(\)",
    "TwoTensor": r"such as its .dequantize\(\)",
    "freed": "its memory was freed",
    "functional": "outside of torch.func's transforms",
}
CALLS = """
def refused(call):
    try:
        call()
    except expo.UsageError as error:
        print(error)
    else:
        raise SystemExit("nothing was refused")
for alpha in (0.0, 0.3):
    x, y, fine = make(), make(), torch.ones_like(make(), device=make().device)
    refused(lambda: expo.extrapolate(x, y, alpha))
    refused(lambda: expo.extrapolate(x, y, alpha, out=y))
    refused(lambda: expo.extrapolate([x], [y], alpha))
    refused(lambda: expo.extrapolate([x], [y], alpha, out=[y]))
    if x.device.type == "cpu":
        fine = torch.ones(4, dtype=x.dtype)
        refused(lambda: expo.extrapolate(fine, fine, alpha, out=y))
        refused(lambda: expo.extrapolate(x, fine, alpha))
        refused(lambda: expo.extrapolate(fine, y, alpha))
"""


# A call that is not refused kills its process, so each kind gets a process, forked from one that has imported torch.
FORKS = """
import contextlib, io, json, os, sys, traceback, torch, expo
kinds, calls = json.loads(sys.argv[1])
for kind, how in kinds.items():
    sys.stdout.flush()
    if child := os.fork():
        print(json.dumps([kind, "", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
        continue
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            exec(how + calls, {"torch": torch, "expo": expo})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(json.dumps([kind, said.getvalue(), 0]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, int]]:
    """Return the text that each kind's process printed, and its exit code, which is negative if a signal killed it."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, json.dumps([WITHOUT_MEMORY, CALLS])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, int]] = {}
    for kind, text, code in map(json.loads, done.stdout.splitlines()):
        before, worst = found.get(kind, ("", 0))
        found[kind] = before + text, worst or code
    assert found.keys() == WITHOUT_MEMORY.keys(), done.stderr
    return found


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_a_tensor_without_memory_is_refused_by_name(kind: str, said: dict[str, tuple[str, int]]) -> None:
    text, code = said[kind]
    assert code == 0, (code, text)
    lines = text.splitlines()
    assert len(lines) == (8 if kind == "meta" else 14)
    names = {"fake": "FakeTensor", "wrapper": "Wrapper", "TwoTensor": "TwoTensor"}
    for line in lines:
        start = rf"(sft|aligned|out) is a {names.get(kind, 'Tensor')} on (cpu|meta) without memory of its own: "
        assert re.match(start, line), line
        assert re.search(ADVICE[kind], line), line


class Plain(torch.Tensor):
    """A subclass that owns its memory."""


def test_a_subclass_with_memory_of_its_own_is_as_good_as_any() -> None:
    sft, aligned = make("torch", "BF16", (4, 3), 1), make("torch", "BF16", (4, 3), 2)
    bits = expected(sft, aligned, 0.3)
    mine = aligned.clone().as_subclass(Plain)  # type: ignore[arg-type]
    assert raw(expo.extrapolate(sft.as_subclass(Plain), mine, 0.3)) == bits
    assert raw(expo.extrapolate([sft], [torch.nn.Parameter(mine)], 0.3)[0]) == bits
    assert expo.extrapolate([sft], [mine], 0.3, out=[mine])[0] is mine
    assert raw(mine) == bits


def test_a_transform_of_torch_func_is_refused() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(expo.UsageError, match=r"outside of torch\.func's transforms"):
        torch.func.vmap(lambda s, a: expo.extrapolate(s, a, 0.3))(x, x)
    with pytest.raises(expo.UsageError, match=r"outside of torch\.func's transforms"):
        torch.func.grad(lambda a: expo.extrapolate(x, a, 0.3).sum())(x)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_masked_arrays_are_refused(which: int, alpha: float) -> None:
    arrays: list[Any] = [np.zeros(3, np.float32) for _ in range(3)]
    arrays[which] = np.ma.array(arrays[which], mask=[True, False, False])
    with pytest.raises(expo.UsageError, match=f"{('sft', 'aligned', 'out')[which]} is a masked array"):
        expo.extrapolate(arrays[0], arrays[1], alpha, out=arrays[2])


# Several tensors in one call


def many(torch: Any, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    shapes = [(3, 5), (), (0,), (2049,), (7, 11)]
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64]
    return [torch.randn(shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]


def test_lists_and_iterators_of_tensors() -> None:
    sft, aligned = many(torch, 1), many(torch, 2)
    expected = [expo.extrapolate(s, a, 0.3) for s, a in zip(sft, aligned, strict=True)]
    for given in (expo.extrapolate(sft, aligned, 0.3), expo.extrapolate(iter(sft), tuple(aligned), 0.3)):
        assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))
    back = expo.extrapolate(sft, aligned, 0.3, out=aligned)
    assert all(x is y for x, y in zip(back, aligned, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(back, expected, strict=True))


def test_lists_of_arrays() -> None:
    sft, aligned = (list(np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32)) for i in (1, 2))
    expected = [expo.extrapolate(s, a, 0.3) for s, a in zip(sft, aligned, strict=True)]
    assert all(np.array_equal(x, y) for x, y in zip(expo.extrapolate(sft, aligned, 0.3), expected, strict=True))


def test_parameters_of_a_model_in_place() -> None:
    sft, aligned = (torch.nn.Linear(5, 3, dtype=torch.bfloat16) for _ in range(2))
    expected = [expo.extrapolate(s.data, a.data, 0.5) for s, a in zip(sft.parameters(), aligned.parameters())]  # noqa: B905
    expo.extrapolate(sft.parameters(), aligned.parameters(), 0.5, out=aligned.parameters())
    assert all(torch.equal(x, y) for x, y in zip(aligned.parameters(), expected, strict=True))


def test_tied_weights_that_are_listed_twice_move_once() -> None:
    sft, aligned = torch.zeros(5), torch.ones(5)
    expo.extrapolate([sft, sft.view(5)], [aligned, aligned.view(5)], 0.5, out=[aligned, aligned.view(5)])
    assert aligned.tolist() == [1.5] * 5


def memory_of(library: str) -> tuple[Any, Any]:
    """Return 40 numbers in one memory, and a function that makes n other numbers."""
    return make(library, "F32", (40,), 1), lambda n: make(library, "F32", (n,), 2)


def refused(sft: list[Any], aligned: list[Any], out: list[Any], words: str) -> None:
    before = [raw(x) for x in (*sft, *aligned, *out)]
    for alpha in (0.5, 0.0):
        with pytest.raises(expo.UsageError, match=words):
            expo.extrapolate(sft, aligned, alpha, out=out)
    assert [raw(x) for x in (*sft, *aligned, *out)] == before, "something was computed before the refusal"


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_output_of_two_different_pairs_is_refused(library: str) -> None:
    memory, other = memory_of(library)
    tied = memory[:10]
    a, b, c, d = (other(10) for _ in range(4))
    refused([a, b, c], [d, tied, tied], [d, tied, tied], r"out\[1\] and out\[2\] are the same memory")
    refused([a, a], [b, c], [tied, tied], r"out\[0\] and out\[1\] are the same memory")
    refused([a, b, c], [memory[:10], d, memory[5:15]], [memory[:10], d, memory[5:15]], r"out\[0\] and out\[2\] overlap")
    large = other(30)
    refused([a, large, b], [c, memory[:30], d], [c, memory[:30], memory[10:20]], r"out\[1\] and out\[2\] overlap")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("role", ["sft", "aligned"])
def test_an_output_over_the_input_of_another_pair_is_refused(library: str, role: str) -> None:
    memory, other = memory_of(library)
    for near in (memory[:10], memory[5:15], memory[3:7]):
        inputs, others = [other(len(near)), other(10), near], [other(len(near)), other(10), other(len(near))]
        sft, aligned = (inputs, others) if role == "sft" else (others, inputs)
        out = [other(len(near)), memory[:10], other(len(near))]
        refused(sft, aligned, out, rf"out\[1\] overlaps {role}\[2\], so the result would depend on the order")


@pytest.mark.parametrize("library", LIBRARIES)
def test_lists_that_share_memory_and_depend_on_no_order(library: str) -> None:
    """Lists may share inputs, have outputs beside each other or columns of one matrix, and repeat a pair exactly."""
    memory, other = memory_of(library)
    s, a, wide = other(10), other(10), make(library, "F32", (4, 6), 3)
    bits = expected(s, a, 0.5)
    outs = [memory[:10], memory[10:20], memory[20:30], memory[20:30]]
    expo.extrapolate([s, s, s, s], [a, a, a, a], 0.5, out=outs)
    assert all(raw(out) == bits for out in outs)
    expo.extrapolate([s, memory[30:40]], [memory[:10], a], 0.5, out=[memory[:10], memory[30:40]])
    assert raw(memory[:10]) == expected(s, outs[1], 0.5)
    columns = [wide[:, :3], wide[:, 3:], wide[:, :3]]
    given = [make(library, "F32", (4, 3), seed) for seed in (4, 5, 4)]
    given[2] = given[0]
    wanted = [expected(x, column, 0.5) for x, column in zip(given, columns, strict=True)]
    expo.extrapolate(given, columns, 0.5, out=columns)
    assert [raw(column) for column in columns] == wanted
    refused(given[:2], [wide[:, :3], wide[:, 2:5]], [wide[:, :3], wide[:, 2:5]], r"out\[0\] and out\[1\] overlap")


def test_tied_weights_of_which_one_shows_the_negative_are_two_pairs() -> None:
    sft, aligned = torch.ones(5), torch.ones(5)
    refused([sft, torch._neg_view(sft)], [aligned, aligned], [aligned, aligned], "are the same memory")


def test_many_shared_inputs_are_compared_in_good_time() -> None:
    """The comparison is not quadratic in a list of 20 000 tensors."""
    shared, memory = torch.zeros(4), torch.zeros(20_000, 4)
    with at_most(20):
        expo.extrapolate([shared] * len(memory), list(memory), 0.5, out=list(memory))
        expo.extrapolate([shared] * 2000, [*memory[:1000]] * 2, 0.5, out=[*memory[:1000]] * 2)


def test_numbers_of_tensors_that_differ() -> None:
    ones = np.ones(3, np.float32)
    with pytest.raises(expo.UsageError, match="sft 1, aligned 2, out 2"):
        expo.extrapolate([ones], [ones, ones], 0.3)
    with pytest.raises(expo.UsageError, match="sft 1, aligned 1, out 0"):
        expo.extrapolate([ones], [ones], 0.3, out=[])


def test_what_goes_into_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU one launch computes the contiguous tensors of the kernel's dtypes if alpha is not 0.

    The other tensors are computed one by one.
    """
    launched: list[tuple[float, list[Any]]] = []
    monkeypatch.setattr("expo.tensors.gpu_tensors.on_gpu", lambda _: True)
    monkeypatch.setattr(
        "expo.tensors.gpu_tensors.compute_together",
        lambda triples, alpha: launched.append((alpha, [out for *_, out in triples])),
    )
    sft, aligned = many(torch, 1), many(torch, 2)
    aligned[4], sft[4] = torch.ones(4, 6, dtype=torch.bfloat16).t(), torch.ones(6, 4, dtype=torch.bfloat16)
    aligned.append(torch.ones(3, dtype=torch.float64))
    sft.append(torch.zeros(3))
    outs = expo.extrapolate(sft, aligned, 0.3)
    assert launched == [(working_alpha(0.3), launched[0][1])]
    assert [out.shape for out in launched[0][1]] == [out.shape for out in outs[:4]]
    assert outs[4].unique().tolist() == [1.0]
    assert outs[5].unique().tolist() == [1.3]
    assert all(torch.equal(x, y) for x, y in zip(expo.extrapolate(sft, aligned, 0.0), aligned, strict=True))
    assert len(launched) == 1


# Writes count in the version of the tensor that is overwritten


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["single", "list", "strided", "double"])
def test_a_backward_pass_does_not_use_numbers_that_were_overwritten(kind: str, alpha: float) -> None:
    dtype = torch.float64 if kind == "double" else torch.float32
    sft, aligned, out = (torch.randn(4, 6, dtype=dtype) for _ in range(3))
    if kind == "strided":
        sft, aligned, out = sft.t(), aligned.t(), out.t()
    out.requires_grad_()
    loss = (out * out).sum()
    version = out._version
    if kind == "list":
        expo.extrapolate([sft], [aligned], alpha, out=[out])
    else:
        expo.extrapolate(sft, aligned, alpha, out=out)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_is_overwritten_counts_a_write() -> None:
    sft, aligned = torch.randn(2, 5)
    before = sft._version
    expo.extrapolate(sft, aligned, 0.3)
    expo.extrapolate([sft], [aligned], 0.3)
    assert (sft._version, aligned._version) == (before, before)


def test_a_tensor_of_inference_mode_has_no_version() -> None:
    with torch.inference_mode():
        sft, aligned, out = torch.randn(3, 5)
    expo.extrapolate(sft, aligned, 0.3, out=out)
    assert raw(out) == raw(expo.extrapolate(sft.clone(), aligned.clone(), 0.3))
