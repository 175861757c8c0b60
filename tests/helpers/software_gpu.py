"""Simulate a GPU: a test launches kernels as on a GPU, `kernel[grid](...)`, and their PTX runs on this CPU.

This module replaces the following parts of Triton, and nothing in expo/ or kernels/:

- the driver (`triton.runtime.driver.active`): it names the target, one device and one stream;
- `utils.load_binary`, which would load the machine code, and `utils.get_device_properties`;
- the launcher (`launcher_cls`), which would pass grid and arguments to CUDA: this one runs the PTX that Triton compiled
  for this launch in the interpreter of `ptx.py`, on the memory of the passed tensors, which are on the CPU.

So Triton's own launch path runs: binding and hashing of arguments, specialization, compilation and caches. The machine
code of ptxas, CUDA's launch and streams do not run; `rewrite` can change the PTX as ptxas might.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import ptx
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

WRITTEN = ("out_ptr", "sums_ptr", "counts_ptr")  # arguments that a kernel may write to
NUMBERS = itertools.count(1000)  # the numbers of devices, by which Triton finds its compiled kernels


class SoftwareGpu(DriverBase):
    """A driver for Triton.

    Attributes:
        launches: The name and the grid of every launch, in order.
    """

    def __init__(self, arch: int = 90, rewrite: Callable[[str], str] = lambda text: text) -> None:
        """Create a driver.

        Args:
            arch: The compute capability times 10.
            rewrite: Changes the PTX before it runs.
        """
        self.target = GPUTarget("cuda", arch, 32)
        self.rewrite = rewrite
        self.launches: list[tuple[str, int]] = []
        self.utils = self
        self._number = next(NUMBERS)

    @contextmanager
    def active(self) -> Iterator[SoftwareGpu]:
        """Make this object Triton's driver until the end of the block."""
        config = triton.runtime.driver
        before = dict(vars(config))
        config.set_active(self)
        try:
            yield self
        finally:
            vars(config).clear()
            vars(config).update(before)

    # Triton calls these methods of a driver.

    @classmethod
    def is_active(cls) -> bool:
        return False  # only `active` activates this driver

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)

    # Triton calls these methods of `utils`, which is this object too.

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Return module, function, registers, spills and threads. Without a module Triton unloads nothing at exit."""
        return None, None, 0, 0, 1024


@lru_cache(maxsize=64)
def parsed(text: str, shared: int) -> ptx.Kernel:
    """Return the kernel of a PTX text, which takes longer to parse than to run for a small tensor."""
    return ptx.Kernel(text, shared)


class Launcher:
    """The launcher of a compiled kernel."""

    def __init__(self, gpu: SoftwareGpu, source: Any, metadata: Any) -> None:
        self._gpu: Any = gpu
        self._source, self.name = source, metadata.name
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
        (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
        self._kernel = parsed(gpu.rewrite(Path(path).read_text()), metadata.shared)

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        """Run the PTX on the memory of the arguments."""
        given = self.given(rest)
        memory = ptx.Memory()
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                memory.map(value.data_ptr(), extent(value), name in WRITTEN)
        if "table_ptr" in given:
            self._reach(memory, given["table_ptr"], self.arguments(rest))
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given.values()]
        assert (y, z) == (1, 1)
        self._gpu.launches.append((self.name, x))
        self.run(x, numbers, memory)

    def run(self, programs: int, numbers: list[Any], memory: ptx.Memory) -> None:
        """Run the PTX of all programs with the kernel's arguments as addresses and numbers."""
        # The sizes of Triton's scratch memory come last; these kernels do not use it.
        hidden = [0] * (len(self._kernel.parameters) - len(numbers))
        self._kernel.run(range(programs), numbers + hidden, memory)

    def arguments(self, rest: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments with the constants, which come after two kinds of metadata and two hooks."""
        return dict(zip(self._source.fn.arg_names, rest[4:], strict=True))

    def given(self, rest: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments that are no constants."""
        arguments = self.arguments(rest)
        return {name: arguments[name] for name, kind in self._source.signature.items() if kind != "constexpr"}

    @staticmethod
    def _reach(memory: ptx.Memory, table: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Give a kernel access to the tensors whose addresses are in its table."""
        items = [arguments[name].primitive_bitwidth // 8 for name in ("SFT", "ALIGNED", "ALIGNED")]
        for *addresses, n in table.tolist():
            for i, (address, item) in enumerate(zip(addresses, items, strict=True)):
                memory.map(address, n * item, i == 2)


def extent(tensor: torch.Tensor) -> int:
    """Return the number of bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
