"""How long does Live take to set the alpha of a model in memory, compared with the kernel alone?

The kernel moves as many bytes with as many threads.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from expo.execution.engines import cpu_count
from expo.kernels.contract import Address, Operand
from expo.tensors.arrays import MOST_THREADS, compute_on_cpu
from expo.tensors.live import Live

SIDE, MATRICES = 4096, 16
ELEMENTS = SIDE * SIDE * MATRICES
LIVE_ROUNDS = 9
MOST_KERNEL_TIMES = 1.3  # Live takes at most this multiple of the kernel's time


class Model(torch.nn.Module):
    """A model of matrices, with vectors between them like those of a language model."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        matrices = (torch.randn(SIDE, SIDE, generator=random) * 0.02 * scale for _ in range(MATRICES))
        self.matrices = torch.nn.ParameterList([matrix.to(torch.bfloat16) for matrix in matrices])
        self.norms = torch.nn.ParameterList([torch.ones(SIDE, dtype=torch.bfloat16) * scale for _ in range(MATRICES)])


class Kernel:
    """The kernel alone, over one contiguous piece of memory that the threads share evenly."""

    def __init__(self) -> None:
        self._tensors = [torch.empty(ELEMENTS, dtype=torch.bfloat16).fill_(value) for value in (0.5, 0.51, 0.0)]
        threads = min(cpu_count(), MOST_THREADS)
        size = 2 * (ELEMENTS // threads)  # bytes of one thread's share of a tensor
        self._shares = [
            [Operand(Address(each.data_ptr() + k * size, size), "BF16") for each in self._tensors]
            for k in range(threads)
        ]
        self._pool = ThreadPoolExecutor(threads)

    def measure_seconds(self) -> float:
        """Return the seconds of one pass."""
        start = time.perf_counter()
        list(self._pool.map(lambda share: compute_on_cpu(share[0], share[1], 0.3, share[2].memory), self._shares))
        return time.perf_counter() - start


def test_live(benchmark: Any) -> None:
    """Time Live; extra_info["of_kernel"] is its time divided by the kernel's, the median of the rounds."""
    pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    model, sft = Model(1.01), Model(1.0)
    live = Live(model, sft)
    kernel = Kernel()
    kernel_seconds: list[float] = []
    alphas = iter(range(1, 1000))

    def time_kernel() -> tuple[tuple[()], dict[str, Any]]:
        kernel_seconds.append(kernel.measure_seconds())
        return (), {}

    def set_alpha() -> None:
        live.alpha = next(alphas) / 100

    benchmark.group = "live, bf16, all threads"
    benchmark.pedantic(set_alpha, setup=time_kernel, rounds=LIVE_ROUNDS, warmup_rounds=1)
    pairs = zip(benchmark.stats.stats.data, kernel_seconds[-LIVE_ROUNDS:], strict=True)
    ratio = statistics.median(live_seconds / alone for live_seconds, alone in pairs)
    moved = sum(parameter.nbytes for parameter in model.parameters()) * 3
    benchmark.extra_info.update(
        bytes_moved=moved,
        gb_per_s=round(moved / statistics.median(benchmark.stats.stats.data) / 1e9, 2),
        of_kernel=round(ratio, 3),
    )
    assert ratio <= MOST_KERNEL_TIMES
    live.alpha = 0
    assert torch.equal(model.matrices[3], Model(1.01).matrices[3])
