"""Check the outputs of merges and rivals, on the tensors of the first shard."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from bench.rivals import ALPHA, find_shards
from expo.kernels import numerics
from expo.kernels.contract import Operand, extrapolation, working_alpha

Check = Callable[[Path], None]  # the argument is an output's folder


def check_exact(out: Path, alpha: float = ALPHA) -> None:
    """Assert that the tensors have the bits of the definition."""
    for name, result, expected in _tensors(out, alpha):
        assert np.array_equal(result.view(torch.int16).numpy(), expected.view(torch.int16).numpy()), name


def check_close(out: Path) -> None:
    """Assert that the tensors are the definition's to two roundings of bf16, for rivals that round differently."""
    for _, result, expected in _tensors(out, ALPHA):
        torch.testing.assert_close(result, expected, rtol=0.02, atol=1e-5)


def check_copy(out: Path) -> None:
    """Assert that the first shard is a copy of aligned's."""
    assert filecmp.cmp(find_shards(out.parent / "aligned")[0], find_shards(out)[0], shallow=False)


def check_nothing(out: Path) -> None:
    """Assert that there is no output."""
    assert not out.exists()


def _tensors(out: Path, alpha: float) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, result, expected result) of every tensor of aligned's first shard; both are flat and bf16."""
    first = find_shards(out.parent / "aligned")[0]
    outputs = [safe_open(path, "pt") for path in find_shards(out)]
    output_of = {name: file for file in outputs for name in file.keys()}  # noqa: SIM118, safe_open is no dict
    sft, aligned = safe_open(out.parent / "sft" / first.name, "pt"), safe_open(first, "pt")
    for name in aligned.keys():  # noqa: SIM118
        s, a, result = (file.get_tensor(name).flatten() for file in (sft, aligned, output_of[name]))
        expected = torch.empty_like(a)
        memories = [tensor.view(torch.int16).numpy() for tensor in (s, a, expected)]
        operands = [Operand(memory, "BF16") for memory in memories[:2]]
        numerics.extrapolate(*extrapolation(*operands, (working_alpha(alpha),)), (memories[2],), False)
        yield name, result, expected
