"""A GPU in software: kernels are launched as on a GPU, `kernel[grid](...)`, and their PTX runs on this CPU.

Replaced are these edges of Triton, and nothing in expo/ or kernels/:

- the driver (`triton.runtime.driver.active`): it names the target, one device and one stream;
- `utils.load_binary`, which would load the machine code, and `utils.get_device_properties`;
- the launcher (`launcher_cls`), which would hand grid and arguments to CUDA: it runs the PTX that Triton compiled for
  this launch in the interpreter of `helpers.ptx`, on the memory of the tensors that were passed, which are on the CPU.

So Triton's own launch path runs: binding and hashing of arguments, specialization, compilation and caches. Not run:
ptxas's machine code (`rewrite` may stand for what ptxas does to the PTX), CUDA's launch, streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ptx
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

WRITTEN = ("out_ptr", "sums_ptr", "counts_ptr")  # arguments that a kernel may write to
NUMBERS = itertools.count(1000)  # of devices: Triton keeps what it compiled by them


class SoftwareGpu(DriverBase):
    """Triton's driver; launches: the name and the grid of every launch, in order."""

    def __init__(self, arch: int = 90, rewrite: Callable[[str], str] = lambda text: text) -> None:
        """arch: the compute capability times 10. rewrite: applied to the PTX before it runs."""
        self.target = GPUTarget("cuda", arch, 32)
        self.rewrite = rewrite
        self.launches: list[tuple[str, int]] = []
        self.utils = self
        self._number = next(NUMBERS)

    @contextmanager
    def active(self) -> Iterator[SoftwareGpu]:
        """Be Triton's driver for a while."""
        config = triton.runtime.driver
        before = dict(vars(config))
        config.set_active(self)
        try:
            yield self
        finally:
            vars(config).clear()
            vars(config).update(before)

    # What Triton asks of a driver

    @classmethod
    def is_active(cls) -> bool:
        return False  # never by itself

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

    # Of `utils`

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills and threads. Without a module Triton has nothing to unload at exit."""
        return None, None, 0, 0, 1024


class Launcher:
    """A compiled kernel that can be launched."""

    def __init__(self, gpu: SoftwareGpu, source: Any, metadata: Any) -> None:
        self._gpu, self._source, self._name = gpu, source, metadata.name
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
        (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
        self._kernel = ptx.Kernel(gpu.rewrite(Path(path).read_text()), metadata.shared)

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        """rest: metadata of the kernel and of the launch, two hooks, and the kernel's arguments with the constants."""
        arguments = dict(zip(self._source.fn.arg_names, rest[4:], strict=True))
        given = {name: arguments[name] for name, kind in self._source.signature.items() if kind != "constexpr"}
        memory = ptx.Memory()
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                memory.map(value.data_ptr(), extent(value), name in WRITTEN)
        if "table_ptr" in given:
            self._reach(memory, given["table_ptr"], arguments)
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given.values()]
        numbers += [0] * (
            len(self._kernel.parameters) - len(numbers)
        )  # Triton's scratch memory, of which none is asked
        assert (y, z) == (1, 1)
        self._gpu.launches.append((self._name, x))
        self._kernel.run(range(x), numbers, memory)

    @staticmethod
    def _reach(memory: ptx.Memory, table: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Let a kernel that finds addresses in a table reach the elements there."""
        items = [arguments[name].primitive_bitwidth // 8 for name in ("SFT", "ALIGNED", "ALIGNED")]
        for *addresses, n in table.tolist():
            for i, (address, item) in enumerate(zip(addresses, items, strict=True)):
                memory.map(address, n * item, i == 2)


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
