"""Launch every kernel of expo through the launch path of whichever Triton this process imports, without running it.

python launch_versions.py prints the kernels that were launched. Triton binds, specializes and compiles as for a GPU;
the launcher of the driver only records. A test runs this script with several releases of Triton.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from expo.kernels import extrapolate, sweep, whole_model
from expo.kernels.contract import tensor_extrapolation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAUNCHED: Counter[str] = Counter()


class Driver(DriverBase):
    """A driver that names a GPU, loads nothing and records launches."""

    def __init__(self) -> None:
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return module, function, registers and spills, and since Triton 3.4 the most threads of a block."""
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        return (None, None, 0, 0, 1024) if version >= (3, 4) else (None, None, 0, 0)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
            assert (y, z) == (1, 1)
            assert metadata.target.arch == 90
            LAUNCHED[metadata.name] += 1

        return launch


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    for n, (s, a) in product((7, 5000), product(DTYPES, DTYPES)):
        sft, aligned = torch.ones(n, dtype=s), torch.ones(n, dtype=a)
        extrapolate.launch(*tensor_extrapolation(sft, aligned, (0.3,)), [torch.empty_like(aligned)])
        call = tensor_extrapolation(sft, aligned, torch.tensor([0.3, -0.7]))
        outs = aligned.new_empty(2, n)
        sweep.launch(*call, outs)
        sweep.launch(*call, outs, sweep.Partials.empty(n, 2, aligned.device))
        whole_model.Table([sft], [aligned], [torch.empty_like(aligned)]).launch(0.3)
    print(triton.__version__, dict(sorted(LAUNCHED.items())))


if __name__ == "__main__":
    main()
