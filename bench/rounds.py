"""Rounds: every rival once, then ours, so that a drift of the machine meets all of them; and the checks of results."""

from __future__ import annotations

import filecmp
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bench.rivals import ALPHA, Rival, Times, expo, shards
from expo.kernels import numerics
from expo.kernels.contract import Operand, extrapolation, working_alpha

Check = Callable[[Path], None]


def duel(
    benchmark: Any,
    pair: Path,
    rivals: Sequence[tuple[Rival, Check]],
    ready: Callable[[], None],
    rounds: int,
    ours: Callable[[], None] | None = None,
    check: Check | None = None,
) -> None:
    """Time ours as the benchmark, and the rivals beside it: extra_info["rivals"] has each one's seconds and ratios.

    A ratio is ours / rival of one round. ready is called before each contestant. A first round, not timed, warms up and
    checks what everyone writes.
    """
    ours, check = ours or (lambda: expo(pair, ALPHA)), check or exact
    times: list[Times] = []
    for rival, checked in rivals:
        ready()
        rival(pair)
        checked(pair / "out")
    ready()
    ours()
    check(pair / "out")

    def setup() -> None:
        times.append({})
        for rival, _ in rivals:
            ready()
            times[-1] |= rival(pair)
        ready()

    benchmark.pedantic(ours, setup=setup, rounds=rounds)
    size = sum(path.stat().st_size for path in shards(pair / "aligned"))
    benchmark.extra_info.update(
        checkpoint_bytes=size,
        rivals={name: _against(benchmark.stats.stats.data, [each[name] for each in times]) for name in times[0]},
    )


def _against(ours: Sequence[float], rival: Sequence[float]) -> dict[str, float]:
    """The rival's seconds, and ours over the rival's, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(ours, rival, strict=True)]
    figures = {
        f"{name}{kind}": function(values)
        for name, values in (("", rival), ("ratio_", ratios))
        for kind, function in (("median", statistics.median), ("min", min), ("max", max))
    }
    return {name: round(value, 4) for name, value in figures.items()}


def exact(out: Path, alpha: float = ALPHA) -> None:
    """The first shard's tensors are the definition's, bit for bit."""
    for name, found, truth in _tensors(out, alpha):
        assert np.array_equal(found.view(torch.int16).numpy(), truth.view(torch.int16).numpy()), name


def close(out: Path) -> None:
    """The same to two roundings of bf16, for rivals that round otherwise."""
    for _, found, truth in _tensors(out, ALPHA):
        torch.testing.assert_close(found, truth, rtol=0.02, atol=1e-5)


def copied(out: Path) -> None:
    """The first shard is aligned's."""
    assert filecmp.cmp(shards(out.parent / "aligned")[0], shards(out)[0], shallow=False)


def nothing(out: Path) -> None:
    assert not out.exists()


def _tensors(out: Path, alpha: float) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of aligned's first shard: names, and flat tensors of the output and of the definition."""
    first = shards(out.parent / "aligned")[0]
    files = [safe_open(path, "pt") for path in shards(out)]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118, safe_open is no dict
    weak, strong = safe_open(out.parent / "sft" / first.name, "pt"), safe_open(first, "pt")
    for name in strong.keys():  # noqa: SIM118
        s, a, found = (file.get_tensor(name).flatten() for file in (weak, strong, where[name]))
        truth = torch.empty_like(a)
        memories = [tensor.view(torch.int16).numpy() for tensor in (s, a, truth)]
        operands = [Operand(memory, "BF16") for memory in memories[:2]]
        numerics.extrapolate(*extrapolation(*operands, (working_alpha(alpha),)), (memories[2],), False)
        yield name, found, truth
