"""Live: setting alpha of a model in memory, against the kernel alone on as many bytes with as many threads."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from expo.execution.engines import cpu_count
from expo.kernels.contract import Address, Operand
from expo.tensors.arrays import THREADS, compute_on_cpu
from expo.tensors.live import Live

SIDE, MATRICES, ROUNDS = 4096, 16, 9
ELEMENTS = SIDE * SIDE * MATRICES
MOST = 1.3  # times the kernel's own time


class Model(torch.nn.Module):
    """Matrices and, between them, vectors, as a language model has them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        matrices = (torch.randn(SIDE, SIDE, generator=random) * 0.02 * scale for _ in range(MATRICES))
        self.matrices = torch.nn.ParameterList([matrix.to(torch.bfloat16) for matrix in matrices])
        self.norms = torch.nn.ParameterList([torch.ones(SIDE, dtype=torch.bfloat16) * scale for _ in range(MATRICES)])


class Kernel:
    """One pass over memory in one piece, shared evenly by the threads."""

    def __init__(self) -> None:
        self._tensors = [torch.empty(ELEMENTS, dtype=torch.bfloat16).fill_(value) for value in (0.5, 0.51, 0.0)]
        self._threads = min(cpu_count(), THREADS)
        self._share = ELEMENTS // self._threads
        starts = (2 * k * self._share for k in range(self._threads))
        self._shares = [
            [Operand(Address(start + each.data_ptr(), 2 * self._share), "BF16") for each in self._tensors]
            for start in starts
        ]
        self._pool = ThreadPoolExecutor(self._threads)

    def seconds(self) -> float:
        began = time.perf_counter()
        list(self._pool.map(lambda share: compute_on_cpu(share[0], share[1], 0.3, share[2].memory), self._shares))
        return time.perf_counter() - began


def test_live(benchmark: Any) -> None:
    """extra_info["of_kernel"]: median over the pairs of rounds of Live's time over the kernel's."""
    pytest.importorskip("expo.kernels._cpu", reason="the compiled engine is not built", exc_type=ImportError)
    model, sft = Model(1.01), Model(1.0)
    live = Live(model, sft)
    kernel = Kernel()
    alone: list[float] = []
    alphas = iter(range(1, 1000))

    def first() -> tuple[tuple[()], dict[str, Any]]:
        alone.append(kernel.seconds())
        return (), {}

    def step() -> None:
        live.alpha = next(alphas) / 100

    benchmark.group = "live, bf16, all threads"
    benchmark.pedantic(step, setup=first, rounds=ROUNDS, warmup_rounds=1)
    pairs = zip(benchmark.stats.stats.data, alone[-ROUNDS:], strict=True)
    ratio = statistics.median(ours / kernel for ours, kernel in pairs)
    moved = sum(parameter.nbytes for parameter in model.parameters()) * 3
    benchmark.extra_info.update(
        bytes_moved=moved,
        gb_per_s=round(moved / statistics.median(benchmark.stats.stats.data) / 1e9, 2),
        of_kernel=round(ratio, 3),
    )
    assert ratio <= MOST
    live.alpha = 0
    assert torch.equal(model.matrices[3], Model(1.01).matrices[3])
