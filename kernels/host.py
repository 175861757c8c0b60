"""The Triton kernels behind the contract's signature: memory of the host in and out, computed on the GPU.

Bytes moved: each input up and each output down the bus, once; `sweep.py` says what the GPU's memory sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..dtypes import ITEMSIZE, torch_dtypes
from . import numerics
from .contract import Statistics
from .extrapolate import available, interpreted
from .sweep import Partials, launch, statistics


class HostEngine:
    """An engine for one thread at a time."""

    def __init__(self, device: str) -> None:
        """device: "cuda[:index]". Raises RuntimeError where the kernels cannot run."""
        reason = available()
        if reason:
            raise RuntimeError(reason)
        # An index that is not there fails here, not in the middle of a merge.
        self.device = torch.empty(0, device="cpu" if interpreted() else device).device

    def __call__(
        self,
        sft: Any,
        sft_dtype: str,
        aligned: Any,
        aligned_dtype: str,
        n: int,
        outs: Sequence[Any],
        alphas: Sequence[float],
        measure: bool,
    ) -> Statistics | None:
        """As numerics.extrapolate, which does the tensors of F64: few GPUs are fast at it, and few models have it."""
        if "F64" in (sft_dtype, aligned_dtype):
            return numerics.extrapolate(sft, sft_dtype, aligned, aligned_dtype, n, outs, alphas, measure)
        s, a = self._upload(sft, sft_dtype, n), self._upload(aligned, aligned_dtype, n)
        results = a.new_empty((len(alphas), -(-n // 16) * 16))
        partials = Partials.empty(n, len(alphas), self.device) if measure else None
        launch(s, a, torch.tensor(alphas, dtype=torch.float32, device=self.device), results, partials)
        for result, out in zip(results[:, :n], outs, strict=True):
            bytes_ = result.view(torch.uint8).cpu().numpy()
            np.frombuffer(out, np.uint8, bytes_.size)[:] = bytes_
        return statistics(Partials(*(x.cpu() for x in partials))) if partials else None

    def _upload(self, memory: Any, dtype: str, n: int) -> torch.Tensor:
        size = n * ITEMSIZE[dtype]
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = np.frombuffer(memory, np.uint8, size)
        return host.to(self.device).view(torch_dtypes()[dtype])
