"""The self-test of the Triton kernels: once for each GPU, a tiny run of each kernel is compared with the definition.

A compiler may fuse the product and the sum in spite of its options, as ptxas 12.8 and 12.9 do for Blackwell. At
every position in a block and in a tail, the elements of the test have another result, in bf16 and in fp32, if they are
rounded once in place of twice.
"""

from __future__ import annotations

import numpy as np
import torch

from . import extrapolate, sweep, whole_model
from .contract import EngineFunction, Operand, extrapolation, tensor_extrapolation, working_alpha
from .extrapolate import interpreted, launching
from .numerics import narrow

ALPHA = working_alpha(2.975)
STEPS, DIFFERENCE = 11, np.float32(25 / 128)  # a = 1 + k/128 for k < STEPS, and s = a + DIFFERENCE
N = sweep.PROGRAM_ELEMENTS + 13  # elements: each kernel has a full block and one that is not full

_passed: set[torch.device] = set()


def passed(device: torch.device) -> bool:
    """Return True if a device has passed in this process, or needs no test because Triton's interpreter runs."""
    return device in _passed or interpreted()


def check(device: torch.device) -> None:
    """Test the kernels on a device, unless the device has passed in this process.

    The test waits for the device, so no graph may be captured at the same time.

    Raises:
        RuntimeError: A kernel gives other bits than the definition.
        Exception: A kernel cannot run; an error of a compiler may have any type.
    """
    if passed(device):
        return
    with launching(torch.empty(0, device=device)):
        if device not in _passed:
            _run(device)
            _passed.add(device)


def check_in_host_memory(engine: EngineFunction) -> None:
    """Compare the results of an engine for memory of the host with the definition.

    Raises:
        RuntimeError: The engine gives other bits.
        Exception: The engine's kernel cannot run; an error of a compiler may have any type.
    """
    sft, aligned, expected = elements()
    out = torch.zeros_like(aligned)
    s, a, o = (tensor.view(torch.uint8).numpy().data for tensor in (sft, aligned, out))
    engine(*extrapolation(Operand(s, "BF16"), Operand(a, "BF16"), (ALPHA,)), [o], True)
    _compare("sweep_addresses", out, expected)


def elements(dtype: str = "BF16") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sft, aligned and the result that the definition gives, on the host; the dtype is "BF16" or "F32"."""
    a = (1 + np.arange(N) % STEPS / 128).astype(np.float32)
    s = a + DIFFERENCE
    r = a + np.float32(ALPHA) * (a - s)
    if dtype == "F32":
        return torch.from_numpy(s), torch.from_numpy(a), torch.from_numpy(r)
    bits = np.empty((3, N), np.uint16)
    for row, values in enumerate((s, a, r)):
        narrow(values, "BF16", bits[row])
    sft, aligned, expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return sft, aligned, expected


def _run(device: torch.device) -> None:
    """Launch each kernel, and compare its results with the definition's."""
    sft, aligned, expected = elements()
    s, a = sft.to(device), aligned.to(device)
    outs = {name: torch.zeros_like(a) for name in ("extrapolate", "sweep", "sweep without statistics", "whole_model")}
    partials = sweep.Partials.empty(N, 1, a.device)
    extrapolate.launch(*tensor_extrapolation(s, a, (ALPHA,)), [outs["extrapolate"]])
    alphas = torch.tensor([ALPHA], dtype=torch.float32, device=device)
    sweep.launch(*tensor_extrapolation(s, a, alphas), outs["sweep"].unsqueeze(0), partials)
    sweep.launch(*tensor_extrapolation(s, a, alphas), outs["sweep without statistics"].unsqueeze(0))
    whole_model.Table([s], [a], [outs["whole_model"]]).launch(ALPHA)
    for name, out in outs.items():
        _compare(name, out, expected)
    sft, aligned, expected = elements("F32")
    out = torch.zeros_like(aligned, device=device)
    extrapolate.launch(*tensor_extrapolation(sft.to(device), aligned.to(device), (ALPHA,)), [out])
    _compare("extrapolate for fp32", out, expected)
    found = sweep.statistics(sweep.Partials(*(each.cpu() for each in partials)))
    if found.counts != ((N, 0),) or found.max_abs_d != DIFFERENCE:
        raise RuntimeError(f"the kernel sweep gives wrong statistics: {found}")


def _compare(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise RuntimeError if a kernel's bits are not those expected, with the likely reason.

    If each wrong result is the next number above or below the right one, it was probably rounded once in place of
    twice.
    """
    integer = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    apart = (out.cpu().view(integer).long() - expected.view(integer).long()).abs()
    wrong = int((apart != 0).sum())
    if wrong:
        why = ", as if products and sums were fused" if int(apart.max()) == 1 else ""
        raise RuntimeError(f"the kernel {name} gives wrong bits for {wrong} of {N} elements{why}")
