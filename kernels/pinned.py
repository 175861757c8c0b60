"""Pinned memory of the host, which a GPU copies from and to while the host goes on.

torch's own allocator rounds each size up to a power of two, so 80 GB would take 128 GB, and keeps the memory until the
process ends. This module registers anonymous pages with CUDA instead: as many as are asked for, until they are freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterable

import torch

from ..memory import PAGE, page_aligned


def pinned(size: int, devices: Iterable[torch.device]) -> torch.Tensor:
    """Return `size` bytes of pinned memory that start at a page, as a uint8 tensor.

    The memory is freed with the last view of the tensor, after a wait for all work of the devices: torch does not know
    which copies still use memory that it has not allocated. If CUDA registers no memory, the tensor is torch's own.

    Args:
        size: The number of bytes.
        devices: The GPUs that copy from this memory or to it.

    Raises:
        RuntimeError: The system has too little memory that can be pinned.
    """
    devices = tuple(devices)
    # ctypes wraps the memory because a finalizer needs an object that can be referenced weakly.
    buffer = (ctypes.c_ubyte * max(size, 1)).from_buffer(page_aligned(max(size, 1)))
    address = ctypes.addressof(buffer)
    if int(torch.cuda.cudart().cudaHostRegister(address, len(buffer), 0)):  # type: ignore[no-untyped-call]
        _report_error(devices)
        memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=True)
        start = -memory.data_ptr() % PAGE
        return memory[start : start + size]
    weakref.finalize(buffer, _unregister, address, devices).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)[:size]


def _unregister(address: int, devices: tuple[torch.device, ...]) -> None:
    """Wait for the devices and unregister memory; a device that has failed for good no longer uses it."""
    with contextlib.suppress(RuntimeError):
        wait(devices)
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def wait(devices: Iterable[torch.device]) -> None:
    """Wait in this thread for all work of some GPUs."""
    for device in devices:
        torch.cuda.synchronize(device)


def _report_error(devices: Iterable[torch.device]) -> None:
    """Let the first launch after a failed call report the call's error here, and not in a later computation."""
    for device in devices:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
