"""How fast is the kernel alone, from memory to memory with one thread?

The contestants are the engines and plain torch, and memcpy shows the speed of the memory. Every round runs memcpy and
then a contestant, over buffers that are used in turn and together exceed the caches. A merge moves three tensors, two
that it reads and one that it writes, and memcpy moves two. The result is checked after the timing.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from expo.dtypes import torch_dtypes
from expo.kernels import numerics
from expo.kernels.contract import Address, Operand, extrapolation, working_alpha

BUFFER_ELEMENTS = 16 << 20
BUFFER_SETS = 4  # the sets are used in turn
KERNEL_ROUNDS = 15
ALPHA = working_alpha(0.3)
DTYPES = ("BF16", "F16", "F32")

Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # (sft, aligned, out)
Contestant = Callable[[str], Launch]  # the argument is the dtype


class Buffers:
    """Sets of (sft, aligned, out) in one dtype, which are used in turn."""

    def __init__(self, dtype: str) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.sets = []
        for _ in range(BUFFER_SETS):
            aligned = torch.randn(BUFFER_ELEMENTS) * 0.02
            # Alpha times this difference is larger than the roundings of the rivals.
            sft = aligned + torch.randn(BUFFER_ELEMENTS) * 0.01
            kind = torch_dtypes()[dtype]
            self.sets.append((sft.to(kind), aligned.to(kind), torch.full((BUFFER_ELEMENTS,), 7.0, dtype=kind)))
        self._turn = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the next set."""
        self._turn += 1
        return self.sets[self._turn % BUFFER_SETS]


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


def cpu(dtype: str, measure: bool = False, variant: str | None = None) -> Launch:
    """Return the compiled engine, with the variant that a merge takes or another one."""
    engine = pytest.importorskip("expo.kernels.cpu", reason="the compiled engine is not built")

    def launch(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        sft, aligned, out = (Address(tensor.data_ptr(), tensor.nbytes) for tensor in (s, a, o))
        arguments = extrapolation(Operand(sft, dtype), Operand(aligned, dtype), (ALPHA,))
        engine.extrapolate(*arguments, (out,), measure, variant)

    return launch


def cpu_with_statistics(dtype: str) -> Launch:
    """Return the compiled engine with the statistics of a merge."""
    return cpu(dtype, measure=True)


def variants() -> dict[str, Contestant]:
    """Return the compiled engine's variants for this processor, each with statistics and without, by their names."""
    try:
        from expo.kernels.cpu import variants as names
    except ImportError:  # the engine is not built
        return {}
    makers = {}
    for name in names():
        makers[f"cpu_{name}"] = partial(cpu, variant=name)
        makers[f"cpu_{name}_with_statistics"] = partial(cpu, variant=name, measure=True)
    return makers


def numpy(dtype: str) -> Launch:
    """Return the engine of NumPy."""

    def launch(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        arguments = extrapolation(Operand(_memory(s), dtype), Operand(_memory(a), dtype), (ALPHA,))
        numerics.extrapolate(*arguments, (_memory(o),), False)

    return launch


def papers_expression(dtype: str) -> Launch:
    """Return the paper's expression in torch."""

    def launch(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        o.copy_(a + ALPHA * (a - s))

    return launch


def torch_in_fp32(dtype: str) -> Launch:
    """Return the definition in torch: a separate subtraction, product and sum in fp32, each rounded once."""

    def launch(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        wide = a.float()
        o.copy_(torch.add(wide, torch.mul(torch.sub(wide, s.float()), ALPHA)))

    return launch


def torch_lerp(dtype: str) -> Launch:
    """Return torch.lerp, which rounds some results differently."""

    def launch(s: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        torch.lerp(s, a, 1 + ALPHA, out=o)

    return launch


EXACT = {each.__name__: each for each in (cpu, cpu_with_statistics, numpy, torch_in_fp32)} | variants()
INEXACT = {each.__name__: each for each in (papers_expression, torch_lerp)}
CONTESTANTS: dict[str, Contestant] = EXACT | INEXACT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_kernel(benchmark: Any, contestant: str, dtype: str) -> None:
    """Time a contestant; extra_info["of_memcpy"] is its GB/s divided by memcpy's, the median of the rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    buffers, launch = Buffers(dtype), CONTESTANTS[contestant](dtype)
    size = BUFFER_ELEMENTS * buffers.sets[0][0].element_size()
    memcpy_rates: list[float] = []

    def copy_first() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        _, a, o = buffers.next()
        start = time.perf_counter()
        ctypes.memmove(o.data_ptr(), a.data_ptr(), size)
        memcpy_rates.append(2 * size / (time.perf_counter() - start))
        return buffers.next(), {}

    benchmark.group = f"kernel, {dtype}, one thread"
    benchmark.pedantic(launch, setup=copy_first, rounds=KERNEL_ROUNDS, warmup_rounds=2)
    torch.set_num_threads(threads)
    rates = [3 * size / seconds for seconds in benchmark.stats.stats.data]
    pairs = zip(rates, memcpy_rates[-len(rates) :], strict=True)
    benchmark.extra_info.update(
        bytes_moved=3 * size,
        gb_per_s=round(statistics.median(rates) / 1e9, 2),
        memcpy_gb_per_s=round(statistics.median(memcpy_rates) / 1e9, 2),
        of_memcpy=round(statistics.median(rate / memcpy for rate, memcpy in pairs), 3),
    )
    _check(contestant, launch, buffers)


def _check(contestant: str, launch: Launch, buffers: Buffers) -> None:
    """Compare a result with the definition: bit for bit, or to a few roundings."""
    s, a, out = buffers.next()
    launch(s, a, out.zero_())
    expected = torch.empty_like(a)
    numpy(buffers.dtype)(s, a, expected)
    if contestant in EXACT:
        assert np.array_equal(_memory(out), _memory(expected))
    else:
        torch.testing.assert_close(out, expected, rtol=0.02, atol=1e-3)
