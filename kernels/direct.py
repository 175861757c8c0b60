"""The engine triton on a GPU that uses the host's page tables: the kernel reads and writes memory of the host itself.

Such a GPU (GH200, GB200) can access every address of the process, also those of a mapped file, so nothing is uploaded
and nothing is downloaded except the statistics.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton

from ..dtypes import ITEMSIZE
from ..memory import page_aligned
from . import convert, numerics, sweep
from .contract import Operand, Statistics, Term, buffer_of, extrapolation, extrapolation_term
from .extrapolate import OPTIONS, launching, ptx
from .whole_model import ACCESS_BYTES, constants

USES_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES of the CUDA driver


@cache
def uses_host_page_tables(index: int) -> bool:
    """Return True if the CUDA driver says that a GPU uses the page tables of the host."""
    if torch.version.hip is not None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, value = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(value), USES_HOST_PAGE_TABLES, device)
    )
    return not failed and value.value == 1


class DirectEngine:
    """The engine triton for memory of the host that one GPU can access; several threads may call it."""

    def __init__(self, device: torch.device) -> None:
        """Take the GPU, for which `uses_host_page_tables` is True."""
        self.device = device

    def __call__(
        self, anchor: Operand, terms: Sequence[Term], outputs: Sequence[Any], measure: bool
    ) -> Statistics | None:
        """Compute the term of ExPO as `numerics.extrapolate` does; NumPy computes F64 tensors.

        Raises:
            EngineError: The arguments are not those of ExPO.
        """
        alphas, _, sft = extrapolation_term("triton", anchor, terms)
        n = anchor.elements
        if anchor.scales is not None or sft.scales is not None:  # the values take the place of quantised elements
            values = [_values(operand, n) for operand in (sft, anchor)]
            return self(*extrapolation(values[0], values[1], alphas), outputs, measure)
        if not n or "F64" in (sft.dtype, anchor.dtype):
            return numerics.extrapolate(anchor, terms, outputs, measure)
        size = n * ITEMSIZE[anchor.dtype]
        inputs = [_elements(operand, n) for operand in (sft, anchor)]
        outs = [_bytes_of(out)[:size] for out in outputs]
        pitch = _pitch(outs, ITEMSIZE[anchor.dtype])
        kept = outs
        if pitch is None:  # the outputs are not equally far apart, or at odd addresses
            room = -(-size // ACCESS_BYTES) * ACCESS_BYTES
            memory = np.frombuffer(page_aligned(room * len(outs)), np.uint8).reshape(-1, room)
            outs, pitch = list(memory[:, :size]), room // ITEMSIZE[anchor.dtype]
        partials = self._launch(inputs, (sft.dtype, anchor.dtype), alphas, outs, pitch, n, measure)
        if outs is not kept:
            for out, result in zip(kept, outs, strict=True):
                out[:] = result
        return sweep.statistics(partials) if partials else None

    def _launch(
        self, inputs: Sequence[Any], dtypes: tuple[str, str], alphas: Sequence[float], outs: Sequence[Any],
        pitch: int, n: int, measure: bool,
    ) -> sweep.Partials | None:  # fmt: skip
        """Run the kernel, wait for it, and return the statistics in the memory of the host; None without `measure`."""
        addresses = [array.ctypes.data for array in (*inputs, outs[0])]
        apart = pitch * ITEMSIZE[dtypes[1]] if len(outs) > 1 else 0
        alignment = 1 if any(number % ACCESS_BYTES for number in (*addresses, apart)) else ACCESS_BYTES
        partials = sweep.Partials.empty(n, len(outs), self.device) if measure else None
        on_device = torch.tensor(alphas, dtype=torch.float32, device=self.device)
        with launching(on_device):
            sweep.sweep_addresses[triton.cdiv(n, sweep.PROGRAM_ELEMENTS),](
                *addresses, on_device, *(partials or (None, None)), n, pitch, **constants(*dtypes, alignment),
                K=len(outs), BLOCK=sweep.PROGRAM_ELEMENTS, PTX=ptx(), **OPTIONS,
            )  # fmt: skip
        torch.cuda.current_stream(self.device).synchronize()
        return sweep.Partials(*(each.cpu() for each in partials)) if partials else None


def _bytes_of(memory: Any) -> Any:
    """Return a buffer's bytes as an array of uint8, without a copy."""
    return np.frombuffer(buffer_of(memory), np.uint8)


def _values(operand: Operand, n: int) -> Operand:
    """Return the values of the first n elements, in fp32, of a quantised operand; any other operand as it is."""
    if operand.scales is None:
        return operand
    values = np.empty(n, np.float32)
    convert.dequantize(operand, values)
    return Operand(values, "F32")


def _elements(operand: Operand, n: int) -> Any:
    """Return the bytes of the first n elements: those of the operand, or a copy if an element would be misaligned."""
    item = ITEMSIZE[operand.dtype]
    array = _bytes_of(operand.memory)[: n * item]
    return array if array.ctypes.data % item == 0 else array.copy()


def _pitch(outs: Sequence[Any], item: int) -> int | None:
    """Return the elements from one output to the next; None if the kernel cannot write the outputs where they are."""
    starts = [out.ctypes.data for out in outs]
    steps = {after - before for before, after in pairwise(starts)} or {0}
    if len(steps) > 1 or any(number % item for number in (starts[0], *steps)) or min(steps) < 0:
        return None
    return int(steps.pop()) // item
