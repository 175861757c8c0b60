"""The kernel alone, one thread, from memory to memory: each engine, plain torch, and memcpy as the roof.

Every round runs memcpy and a contestant in turn, over buffers that rotate past the caches; bytes moved are two reads
and a write of every element for a merge, a read and a write for memcpy. The result is checked after the timing.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from expo.kernels import numerics
from expo.kernels.contract import Address, Operand, extrapolation, working_alpha

N = 16 << 20  # elements of a buffer
SETS = 4
ALPHA = working_alpha(0.3)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Buffers:
    """SETS triples of (sft, aligned, out) in one dtype, taken in turn."""

    def __init__(self, dtype: str) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.sets = []
        for _ in range(SETS):
            aligned = torch.randn(N) * 0.02
            sft = aligned + torch.randn(N) * 0.01  # alpha times it is more than rivals' roundings
            kind = DTYPES[dtype]
            self.sets.append((sft.to(kind), aligned.to(kind), torch.full((N,), 7.0, dtype=kind)))
        self.turn = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.turn += 1
        return self.sets[self.turn % SETS]


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


def cpu(dtype: str, measure: bool = False) -> Callable[..., None]:
    engine = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built")

    def run(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        places = [Address(tensor.data_ptr(), tensor.nbytes) for tensor in (s, a, o)]
        arguments = extrapolation(Operand(places[0], dtype), Operand(places[1], dtype), (ALPHA,))
        engine.extrapolate(*arguments, (places[2],), measure)

    return run


def cpu_with_statistics(dtype: str) -> Callable[..., None]:
    return cpu(dtype, measure=True)


def numpy(dtype: str) -> Callable[..., None]:
    def run(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        arguments = extrapolation(Operand(_memory(s), dtype), Operand(_memory(a), dtype), (ALPHA,))
        numerics.extrapolate(*arguments, (_memory(o),), False)

    return run


def papers_expression(dtype: str) -> Callable[..., None]:
    def run(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        o.copy_(a + ALPHA * (a - s))

    return run


def torch_in_fp32(dtype: str) -> Callable[..., None]:
    """Separate sub, mul and add, each rounded once: the definition, in plain torch."""

    def run(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        wide = a.float()
        o.copy_(torch.add(wide, torch.mul(torch.sub(wide, s.float()), ALPHA)))

    return run


def torch_lerp(dtype: str) -> Callable[..., None]:
    def run(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        torch.lerp(s, a, 1 + ALPHA, out=o)

    return run


EXACT = (cpu, cpu_with_statistics, numpy, torch_in_fp32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contestant", [*EXACT, papers_expression, torch_lerp], ids=lambda f: f.__name__)
def test_kernel(benchmark: Any, contestant: Callable[[str], Callable[..., None]], dtype: str) -> None:
    """One thread; extra_info["of_memcpy"]: GB/s over memcpy's, median of the pairs of rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    buffers, run = Buffers(dtype), contestant(dtype)
    item = buffers.sets[0][0].element_size()
    roof: list[float] = []

    def copy_first() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        _, a, o = buffers.next()
        began = time.perf_counter()
        ctypes.memmove(o.data_ptr(), a.data_ptr(), N * item)
        roof.append(2 * N * item / (time.perf_counter() - began))
        return buffers.next(), {}

    benchmark.group = f"kernel, {dtype}, one thread"
    benchmark.pedantic(run, setup=copy_first, rounds=15, warmup_rounds=2)
    torch.set_num_threads(threads)
    moved = [3 * N * item / seconds for seconds in benchmark.stats.stats.data]
    pairs = zip(moved, roof[-len(moved) :], strict=True)
    benchmark.extra_info.update(
        bytes_moved=3 * N * item,
        gb_per_s=round(statistics.median(moved) / 1e9, 2),
        memcpy_gb_per_s=round(statistics.median(roof) / 1e9, 2),
        of_memcpy=round(statistics.median(ours / copy for ours, copy in pairs), 3),
    )
    _check(contestant, run, buffers)


def _check(contestant: Any, run: Callable[..., None], buffers: Buffers) -> None:
    s, a, out = buffers.next()
    run(s, a, out.zero_())
    truth = torch.empty_like(a)
    dtype = buffers.dtype
    numpy(dtype)(s, a, truth)
    if contestant in EXACT:
        assert np.array_equal(_memory(out), _memory(truth))
    else:
        torch.testing.assert_close(out, truth, rtol=0.02, atol=1e-3)
