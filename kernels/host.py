"""The engine triton: an engine for memory of the host that computes with the Triton kernels on a GPU.

Bytes moved: each input is copied to the GPU once, and each output is copied back once. `sweep.py` states the bytes that
move in the memory of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..dtypes import torch_dtypes
from . import dequantize, numerics
from .contract import Operand, Statistics, Term, buffer_of, extrapolation, extrapolation_term
from .extrapolate import interpreted, why_unavailable
from .sweep import Partials, launch, statistics


class HostEngine:
    """The engine triton on one GPU, for one thread at a time."""

    def __init__(self, device: str) -> None:
        """Find the GPU.

        Args:
            device: "cuda:index"; Triton's interpreter computes on the CPU.

        Raises:
            RuntimeError: The kernels cannot run here.
        """
        reason = why_unavailable()
        if reason:
            raise RuntimeError(reason)
        # If no GPU has this index, the error comes here and not in the middle of a merge.
        self.device = torch.empty(0, device="cpu" if interpreted() else device).device

    def __call__(
        self, anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool
    ) -> Statistics | None:
        """Compute the term of ExPO as `numerics.extrapolate` does.

        NumPy computes F64 tensors: few GPUs are fast at fp64, and few models have it.

        Raises:
            EngineError: The arguments are not those of ExPO.
        """
        alphas, _, sft = extrapolation_term("triton", anchor, terms)
        if "F64" in (sft.dtype, anchor.dtype):
            return numerics.extrapolate(anchor, terms, outputs, measure)
        n = anchor.elements
        s, a = self._upload(sft, n), self._upload(anchor, n)
        results = a.memory.new_empty((len(alphas), -(-n // 16) * 16))
        partials = Partials.empty(n, len(alphas), self.device) if measure else None
        device_alphas = torch.tensor(alphas, dtype=torch.float32, device=self.device)
        launch(*extrapolation(s, a, device_alphas), results, partials)
        for result, out in zip(results[:, :n], outputs, strict=True):
            bytes_ = result.view(torch.uint8).cpu().numpy()
            np.frombuffer(buffer_of(out), np.uint8, bytes_.size)[:] = bytes_
        return statistics(Partials(*(x.cpu() for x in partials))) if partials else None

    def _upload(self, operand: Operand, n: int) -> Operand:
        """Return the first n elements of an operand, or the values of quantised ones, as a tensor on the device."""
        size = n * operand.itemsize
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = np.frombuffer(buffer_of(operand.memory), np.uint8, size)
        elements = host.to(self.device)
        if operand.scales is None:
            return operand._replace(memory=elements.view(torch_dtypes()[operand.dtype]))
        values = torch.from_numpy(np.ascontiguousarray(operand.scales.values)).to(self.device)
        out = torch.empty(n, dtype=torch.float32, device=self.device)
        dequantize.launch(operand._replace(memory=elements), values, out)
        return Operand(out, "F32")
