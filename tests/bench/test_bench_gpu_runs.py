"""The benchmarks of a GPU run on the GPU in software: every contestant computes, is timed and is checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

from software_cuda import SoftwareCuda

from bench import bench_gpu
from expo.kernels import extrapolate

if extrapolate.interpreted():
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareCuda]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
        patch.setattr(bench_gpu, "tensor_lengths", lambda dtype: [2500, 77])
        patch.setattr(bench_gpu, "LEAST_CACHE_BYTES", 0)
        patch.setattr(bench_gpu, "LEAST_LAUNCHES", 2)
        yield SoftwareCuda()


@pytest.mark.parametrize(
    "dtype", [pytest.param(each, marks=pytest.mark.exhaustive if each == "F16" else ()) for each in bench_gpu.DTYPES]
)
@pytest.mark.parametrize(
    "contestant",
    [each for each in (bench_gpu.copy, *bench_gpu.KERNELS, *bench_gpu.RIVALS) if each is not bench_gpu.torch_compiled],
    ids=lambda contestant: contestant.__name__,
)
def test_a_contestant(machine: SoftwareCuda, contestant: bench_gpu.Contestant, dtype: str) -> None:
    machine.reset()
    with machine.active():
        sets = bench_gpu.make_inputs(dtype)
        jobs, copies = [contestant(t) for t in sets], [bench_gpu.copy(t) for t in sets]
        seconds: list[float] = []
        before = bench_gpu.gpu_seconds()
        bench_gpu.run_round(copies, jobs, seconds)
        assert seconds == [0.0005], "each event of the GPU in software comes 1 ms after the one before"
        assert bench_gpu.gpu_seconds() > before
        bench_gpu._check(contestant, dtype, sets[0], jobs[0])
        torch.cuda.synchronize()
        assert bool(machine.launches) == (contestant in bench_gpu.KERNELS)
        assert jobs[0].bytes_moved > sets[0].aligned.nbytes
