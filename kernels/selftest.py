"""Do the kernels give the definition's bits on this GPU? A tiny run of each says so, once for each device.

A compiler may fuse the product and the sum whatever it is told (ptxas 12.8 and 12.9 do so for Blackwell). So the
elements are such that one rounding in place of two gives another bf16, at every place in a block and in a tail.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from . import extrapolate, sweep, whole_model
from .contract import working_alpha
from .extrapolate import current, interpreted
from .numerics import narrow

ALPHA = working_alpha(2.975)
STEPS, DIFFERENCE = 11, np.float32(25 / 128)  # a = 1 + k/128 for k < STEPS, s = a + DIFFERENCE: all of them tell
N = sweep.BLOCK + 13  # a full block of each kernel and one that is not

_passed: set[torch.device] = set()
_lock = threading.Lock()


def check(device: torch.device) -> None:
    """Raise RuntimeError if a kernel gives other bits than the definition, or else whatever stops it from running.

    A device that has passed is not asked again in this process. Nothing runs in the interpreter, nor while the current
    stream is being captured into a graph, which takes no launch but the caller's: the next call asks.
    """
    if device in _passed or interpreted():
        return
    with _lock, current(torch.empty(0, device=device)):
        if device not in _passed and not _capturing(device):
            _run(device)
            _passed.add(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def elements() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sft and aligned, bf16 on the host, and the bits of the result as the definition has them, int16."""
    a = (1 + np.arange(N) % STEPS / 128).astype(np.float32)
    s = a + DIFFERENCE
    r = a + np.float32(ALPHA) * (a - s)
    bits = np.empty((3, N), np.uint16)
    for values, row in zip((s, a, r), bits, strict=True):
        narrow(values, "BF16", row)
    sft, aligned, expected = torch.from_numpy(bits.view(np.int16))
    return sft.view(torch.bfloat16), aligned.view(torch.bfloat16), expected


def _run(device: torch.device) -> None:
    """Launch each kernel and compare."""
    sft, aligned, expected = elements()
    s, a = sft.to(device), aligned.to(device)
    outs = {name: torch.zeros_like(a) for name in ("extrapolate", "sweep", "whole_model")}
    partials = sweep.Partials.empty(N, 1, a.device)
    extrapolate.launch(s, a, ALPHA, outs["extrapolate"])
    alphas = torch.tensor([ALPHA], dtype=torch.float32, device=device)
    sweep.launch(s, a, alphas, outs["sweep"].unsqueeze(0), partials)
    whole_model.Table([s], [a], [outs["whole_model"]]).launch(ALPHA)
    for name, out in outs.items():
        wrong = int((out.view(torch.int16).cpu() != expected).sum())
        if wrong:
            raise RuntimeError(f"the kernel {name} gives wrong bits for {wrong} of {N} elements{_why(out, expected)}")
    found = sweep.statistics(sweep.Partials(*(each.cpu() for each in partials)))
    if found.counts != ((N, 0),) or found.max_abs_d != DIFFERENCE:
        raise RuntimeError(f"the kernel sweep gives wrong statistics: {found}")


def _why(out: torch.Tensor, expected: torch.Tensor) -> str:
    """Name the likely reason: results that are all the next number above or below are rounded once."""
    apart = (out.view(torch.int16).cpu().int() - expected.int()).abs()
    return ", as if products and sums were fused" if int(apart.max()) == 1 else ""
