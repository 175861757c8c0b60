"""The memory of a software GPU: tensors of torch in a range of addresses of their own, with the state of every byte.

A tensor whose storage lies in the range of a device counts as that device's tensor. No address is used twice, so a
kernel that reads freed memory finds freed memory. Allocations are CUDA's: 512 bytes apart at least, and stream-ordered
when they are freed.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx
import torch

RANGE_BYTES = 1 << 36  # of addresses for each device; the system gives pages when they are touched
NO_RESERVE = 0x4000  # Linux: MAP_NORESERVE, which Python names since 3.13
APART = 512  # bytes: allocations start at multiples of this number, with at least as many bytes between them
FREE_BYTES = 256 << 20  # what a device claims to have, so that tests of huge tensors skip
UNALLOCATED, UNWRITTEN, WRITTEN, FREED = range(4)
GARBAGE = 0x5A  # fills memory that nothing has written; it gives finite numbers in fp32


class OutOfMemory(torch.cuda.OutOfMemoryError):
    """The software GPU has no memory left."""


class DeviceMemory(ptx.Memory):
    """The memory of one device, or the pinned memory of the host.

    Attributes:
        base: The first address.
        limit: The bytes that may be allocated at a time; an allocation beyond them raises OutOfMemory.
        used: The bytes that are allocated.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._map = mmap.mmap(-1, RANGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        self._states = mmap.mmap(-1, RANGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.states = np.frombuffer(self._states, np.uint8)
        self.base = int(self.bytes.ctypes.data)
        self.limit, self.used = FREE_BYTES, 0
        self._next = APART
        self._starts: list[int] = []
        self._lock = threading.RLock()

    def holds(self, address: int) -> bool:
        """Return True if an address is in the range of this device."""
        return self.base <= address < self.base + RANGE_BYTES

    def allocate(self, size: int, when_freed: Callable[[Callable[[], None]], None]) -> torch.UntypedStorage:
        """Return a new storage of `size` bytes; `when_freed` is called with the action that frees the memory.

        Raises:
            OutOfMemory: The limit is reached.
        """
        size = max(size, 1)  # an empty tensor has a device too
        with self._lock:
            if self.used + size > self.limit:
                raise OutOfMemory(f"CUDA out of memory. Tried to allocate {size} bytes on {self.name}")
            at, self._next = self._next, -(-(self._next + size + APART) // APART) * APART
            self.used += size
        self.states[at : at + size] = UNWRITTEN
        self.bytes[at : at + size] = GARBAGE
        buffer = (ctypes.c_ubyte * size).from_address(self.base + at)
        storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
        weakref.finalize(buffer, when_freed, lambda: self._free(at, size)).atexit = False
        return storage

    def _free(self, at: int, size: int) -> None:
        self.states[at : at + size] = FREED
        with self._lock:
            self.used -= size

    def mark(self, address: int, size: int, state: int = WRITTEN) -> None:
        """Record that bytes have been written."""
        self.states[address - self.base : address - self.base + size] = state

    def require(self, address: int, size: int, what: str, least: int = UNWRITTEN) -> None:
        """Raise a Fault unless all bytes are allocated, and written if `least` is WRITTEN."""
        states = self.states[address - self.base : address - self.base + size]
        wrong = np.flatnonzero((states < least) | (states == FREED))
        if wrong.size:
            kind = ("outside all tensors", "never written", "", "freed")[states[wrong[0]]]
            raise ptx.Fault(f"{what} of memory of {self.name} that is {kind}: {address + int(wrong[0]):#x}")

    def copy_in(self, address: int, source: int, size: int) -> None:
        """Copy bytes of the process to an address of the device."""
        self.require(address, size, "a copy to")
        ctypes.memmove(address, source, size)
        self.mark(address, size)


class RegisteredMemory:
    """Memory of the host that is registered with CUDA, and the two functions of CUDA's runtime that change it.

    Attributes:
        sizes: The bytes of each registered memory, by its address.
        limit: The bytes that may be registered at a time.
        faults: Descriptions of wrong uses.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.limit = 8 << 30
        self.faults: list[str] = []
        self._copies: dict[int, int] = {}  # copies that are under way, by the address of their registered memory

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if sum(self.sizes.values()) + size > self.limit:
            return 2  # cudaErrorMemoryAllocation
        if address % mmap.PAGESIZE or self._at(address) is not None:
            self.faults.append(f"{address:#x} is registered twice, or starts at no page")
        self.sizes[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if self.sizes.pop(address, None) is None:
            self.faults.append(f"{address:#x} is not registered")
        if self._copies.pop(address, 0):
            self.faults.append(f"{address:#x} was freed while a copy used it")
        return 0

    def _at(self, address: int) -> int | None:
        return next((start for start, size in list(self.sizes.items()) if start <= address < start + size), None)

    def find(self, tensor: torch.Tensor) -> int | None:
        """Return the address of the registered memory that a tensor lies in, or None."""
        return self._at(tensor.data_ptr()) if tensor.numel() else None

    def enter(self, registered: int | None) -> None:
        """Record that a copy uses registered memory."""
        if registered is not None:
            self._copies[registered] = self._copies.get(registered, 0) + 1

    def leave(self, registered: int | None) -> None:
        """Record that a copy is done."""
        if registered in self._copies:
            self._copies[registered] -= 1


class HostMemory:
    """The parts of the process's own memory that a kernel may access: (first address, address after, rights)."""

    def __init__(self, spans: list[tuple[int, int, str]]) -> None:
        self._spans = spans

    @classmethod
    def mapped(cls) -> HostMemory:
        """Return every page that is mapped, which a GPU that uses the host's page tables may access."""
        spans = []
        with open("/proc/self/maps", encoding="utf-8") as lines:
            for line in lines:
                addresses, rights = line.split()[:2]
                low, high = (int(text, 16) for text in addresses.split("-"))
                spans.append((low, high, rights))
        return cls(spans)

    def holds(self, address: int, right: str) -> bool:
        """Return True if a page is mapped at an address with the right "r" or "w"."""
        at = bisect.bisect(self._spans, (address, 1 << 64)) - 1
        return at >= 0 and address < self._spans[at][1] and right in self._spans[at][2]


class LaunchMemory(ptx.Memory):
    """The memory that one launch sees: every tensor of the device that exists when the kernel runs.

    Attributes:
        host: The memory of the host, for a device that uses its page tables; else None.
    """

    def __init__(self, memory: DeviceMemory, host: HostMemory | None = None) -> None:
        super().__init__()
        self._memory = memory
        self.host = host
        self._writers: dict[int, int] = {}  # the program that wrote a unit of memory, by its address
        self._written: list[tuple[Any, Any]] = []

    def _units(self, access: ptx.Access, least: int, what: str) -> tuple[Any, Any]:
        """Return the device's memory in units of the access, and the number of each lane's unit."""
        memory = self._memory
        access.require(access.address % access.size == 0, "misaligned")
        at = (access.address.astype(np.uint64) - np.uint64(memory.base)).astype(np.int64)
        access.require((at >= 0) & (at < RANGE_BYTES), f"{what} outside the device's memory")
        for byte in (at, at + access.size - 1):
            states = memory.states[byte]
            access.require(states != UNALLOCATED, f"{what} outside all tensors")
            access.require(states != FREED, f"{what} of freed memory")
            access.require(states >= least, f"{what} of memory that nothing has written")
        units = memory.bytes[: RANGE_BYTES // 16 * 16].view(ptx.STORED[access.width]).reshape(-1, access.words)
        shift = memory.base % access.size
        assert shift == 0  # a mapping starts at a page
        return units, at // access.size

    def _on_host(self, access: ptx.Access, right: str) -> list[Any] | None:
        """Return the host's memory at each lane's address as arrays of words, or None for memory of the device."""
        if self.host is None or not len(access.address) or self._memory.holds(int(access.address[0])):
            return None
        access.require(access.address % access.size == 0, "misaligned")
        for address in {int(each) // 4096 * 4096 for each in access.address}:
            access.require(np.full(len(access.address), self.host.holds(address, right)), "an illegal memory access")
        kind = ptx.STORED[access.width]
        return [
            np.frombuffer((ctypes.c_ubyte * access.size).from_address(int(address)), kind) for address in access.address
        ]

    def load(self, access: ptx.Access) -> Any:
        rows = self._on_host(access, "r")
        if rows is not None:
            return np.stack(rows)
        units, at = self._units(access, WRITTEN, "a read")
        return units[at]

    def store(self, access: ptx.Access, words: Any) -> None:
        rows = self._on_host(access, "w")
        if rows is not None:
            for row, value in zip(rows, np.broadcast_to(words, (len(rows), access.words)), strict=True):
                row[:] = value
            self._record(access, access.address.astype(np.int64) - self._memory.base)
            return
        units, at = self._units(access, UNWRITTEN, "a write")
        units[at] = words
        first = at * access.size
        for k in range(access.size):
            self._memory.states[first + k] = WRITTEN
        self._record(access, first)

    def _record(self, access: ptx.Access, first: Any) -> None:
        """Record the program that wrote each byte; `first` has each lane's first byte, from the device's base."""
        self._written.append(
            (
                np.repeat(first, access.size) + np.tile(np.arange(access.size), len(first)),
                np.repeat(access.program, access.size),
            )
        )

    def check_writers(self) -> None:
        """Raise a Fault if two programs of the launch wrote one byte."""
        if not self._written:
            return
        places = np.concatenate([each for each, _ in self._written])
        programs = np.concatenate([each for _, each in self._written])
        order = np.argsort(places, kind="stable")
        places, programs = places[order], programs[order]
        clash = np.flatnonzero((places[1:] == places[:-1]) & (programs[1:] != programs[:-1]))
        if clash.size:
            address = self._memory.base + int(places[clash[0]])
            raise ptx.Fault(f"programs {programs[clash[0]]} and {programs[clash[0] + 1]} both write {address:#x}")


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and the bytes from there to the end of its last element."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr(), (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()


def find(memories: list[DeviceMemory], tensor: torch.Tensor) -> DeviceMemory | None:
    """Return the memory that a tensor's storage lies in, or None."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without a storage
        return None
    at = bisect.bisect([memory.base for memory in memories], address) - 1
    return memories[at] if at >= 0 and memories[at].holds(address) else None
