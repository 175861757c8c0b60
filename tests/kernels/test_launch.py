"""These tests launch every kernel by the project's own launchers; the bits must be those of the definition.

The GPU is simulated (`software_gpu`): Triton binds, hashes, specializes and compiles as it does for a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch
from engine_calls import run_engine
from same import assert_same

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

from software_gpu import SoftwareGpu

from expo.dtypes import torch_dtypes
from expo.kernels import extrapolate, numerics, sweep, whole_model
from expo.kernels.contract import tensor_extrapolation, working_alpha

if extrapolate.interpreted():
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)

NARROW = ("BF16", "F16", "F32")
PAIRS = list(product(NARROW, NARROW))  # (sft, aligned)
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
ALPHAS = (0.3, -0.7)
POISON, GUARD = 0xA5, 32  # the byte that surrounds outputs, and how many elements of it there are
LENGTHS = (7, 2049, sweep.PROGRAM_ELEMENTS + 2048 + 13)

Array = Any  # the bits of elements


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareGpu]:
    """Yield one GPU for all tests, so that every form of a kernel is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with SoftwareGpu().active() as software:
            yield software


# Each launcher puts the formula's results for ALPHAS into the rows of outs, and returns the kernel's name


def plain(s: torch.Tensor, a: torch.Tensor, outs: torch.Tensor) -> str:
    for alpha, out in zip(ALPHAS, outs, strict=True):
        extrapolate.launch(*tensor_extrapolation(s, a, (working_alpha(alpha),)), [out])
    return "extrapolate"


def swept(s: torch.Tensor, a: torch.Tensor, outs: torch.Tensor) -> str:
    sweep.launch(*tensor_extrapolation(s, a, torch.tensor(ALPHAS)), outs)
    return "sweep"


def measured(s: torch.Tensor, a: torch.Tensor, outs: torch.Tensor) -> str:
    """Launch the sweep with statistics, and assert that the statistics are right."""
    n = a.numel()
    partials = sweep.Partials.empty(n, len(ALPHAS), a.device)
    for each in partials:
        each.view(torch.uint8).fill_(POISON)
    sweep.launch(*tensor_extrapolation(s, a, torch.tensor(ALPHAS)), outs, partials)
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    _, expected = reference(bits_of(s), bits_of(a), (names[s.dtype], names[a.dtype]))
    found = sweep.statistics(partials)
    assert (found.counts, found.max_abs_d) == (expected.counts, expected.max_abs_d)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5, abs=0)
    return "sweep"


def whole(s: torch.Tensor, a: torch.Tensor, outs: torch.Tensor) -> str:
    for alpha, out in zip(ALPHAS, outs, strict=True):
        whole_model.Table([s], [a], [out]).launch(working_alpha(alpha))
    return "whole_model"


Launcher = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], str]
every_launcher = pytest.mark.parametrize("launcher", [plain, swept, measured, whole], ids=lambda f: f.__name__)
# Each dtype is on each side once in `make test`; to compile the kernels for all pairs takes a minute.
SOME = (("BF16", "BF16"), ("F16", "F32"), ("F32", "F16"))
every_pair = pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if pair in SOME else pytest.mark.exhaustive, id="-".join(pair)) for pair in PAIRS],
)


def reference(s: Array, a: Array, pair: tuple[str, str]) -> tuple[list[Array], Any]:
    outs, alphas = [np.empty_like(a) for _ in ALPHAS], [working_alpha(alpha) for alpha in ALPHAS]
    statistics = run_engine(numerics.extrapolate, s, a, pair, outs, alphas, True)
    return outs, statistics


def bits_of(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().view(f"u{tensor.itemsize}")


def tensor_of(bits: Array, dtype: str, shift: int) -> torch.Tensor:
    """Return a tensor of the elements, `shift` elements past an address that is a multiple of 64."""
    memory = torch.empty(bits.nbytes + 64 + shift * bits.itemsize, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + shift * bits.itemsize
    tensor = memory[start : start + bits.nbytes].view(torch_dtypes()[dtype])
    bits_of(tensor)[:] = bits
    return tensor


def verify(launcher: Launcher, s: Array, a: Array, pair: tuple[str, str], shift: int, gpu: SoftwareGpu) -> None:
    """Launch over tensors of these bits, and assert that the outputs are right and the poison around them is kept."""
    n, before = a.size, len(gpu.launches)
    pitch = -(-n // 16) * 16 + GUARD + shift
    fenced = tensor_of(np.full(2 * pitch + GUARD, POISON * 0x1010101 & np.iinfo(a.dtype).max, a.dtype), pair[1], 0)
    outs = fenced.as_strided((2, n), (pitch, 1), fenced.storage_offset() + GUARD - shift)
    name = launcher(tensor_of(s, pair[0], shift), tensor_of(a, pair[1], shift), outs)
    assert {each for each, _ in gpu.launches[before:]} == {name}
    for out, expected in zip(outs, reference(s, a, pair)[0], strict=True):
        assert_same(bits_of(out), expected, pair[1])
    outs.view(torch.int16 if a.itemsize == 2 else torch.int32).fill_(int(bits_of(fenced)[0].astype(f"i{a.itemsize}")))
    assert (bits_of(fenced).view(np.uint8) == POISON).all(), "written beside an output"


def random_bits(pair: tuple[str, str], n: int) -> list[Array]:
    rng = np.random.default_rng(n)
    return [rng.integers(0, np.iinfo(BITS[dtype]).max, n, BITS[dtype], endpoint=True) for dtype in pair]


@pytest.mark.parametrize("shift", [0, 1])
@every_pair
@every_launcher
def test_launch(gpu: SoftwareGpu, launcher: Launcher, pair: tuple[str, str], shift: int) -> None:
    """Random bits give the right outputs at aligned and odd addresses, in lengths around the tail and blocks."""
    for n in LENGTHS:
        verify(launcher, *random_bits(pair, n), pair, shift, gpu)


@every_pair
@every_launcher
def test_special_values(gpu: SoftwareGpu, launcher: Launcher, pair: tuple[str, str]) -> None:
    """Every combination of the two dtypes' special values gives the right output."""
    crossed = product(exact.specials(pair[0]), exact.specials(pair[1]))
    s, a = (np.array(bits, BITS[dtype]) for bits, dtype in zip(zip(*crossed, strict=True), pair, strict=True))
    verify(launcher, s, a, pair, 0, gpu)


def test_a_whole_model_in_place(gpu: SoftwareGpu) -> None:
    """A whole model of all pairs of dtypes is right in place, with one launch for each pair and alignment.

    Half of the tensors are at odd addresses, and one has several rows of the table.
    """
    lengths, shifts = (0, 2 * 2048 + 9), (0, 1)
    cases = [(pair, n, shift) for pair in PAIRS for n in lengths for shift in shifts]
    cases.append((("BF16", "BF16"), whole_model.SEGMENT * extrapolate.PROGRAM_ELEMENTS + 3, 0))
    bits = [random_bits(pair, n) for pair, n, _ in cases]
    sft, aligned = (
        [tensor_of(each[i], pair[i], shift) for each, (pair, _, shift) in zip(bits, cases, strict=True)] for i in (0, 1)
    )
    before = len(gpu.launches)
    whole_model.Table(sft, aligned, aligned).launch(working_alpha(ALPHAS[0]))
    assert len(gpu.launches) - before == len(PAIRS) * len(shifts)
    for out, (s, a), (pair, _, _) in zip(aligned, bits, cases, strict=True):
        assert_same(bits_of(out), reference(s, a, pair)[0][0], pair[1])


@pytest.mark.parametrize("hook", ["jit_cache_hook", "jit_post_compile_hook"])
def test_a_hook_of_the_compiler(hook: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' constants can be written as JSON, which Triton does for a hook; vLLM sets such a hook."""
    import triton

    heard: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda **told: heard.append(told["fn"].name))
    with SoftwareGpu().active() as software:
        for launcher in (plain, measured, whole):
            verify(launcher, *random_bits(("BF16", "F32"), 13), ("BF16", "F32"), 0, software)
    assert [name.rpartition(".")[2] for name in dict.fromkeys(heard)] == ["extrapolate", "sweep", "whole_model"]


@pytest.mark.parametrize("arch", [*(pytest.param(each, marks=pytest.mark.exhaustive) for each in (80, 100)), 120])
def test_other_gpus(arch: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with SoftwareGpu(arch).active() as software:
        for launcher, pair in product((plain, measured, whole), (("BF16", "BF16"), ("F32", "F16"))):
            verify(launcher, *random_bits(pair, sweep.PROGRAM_ELEMENTS + 13), pair, 0, software)


# Other releases of Triton


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", ["3.0.0", "3.2.0", "3.4.0", "3.6.0", "newest"])
def test_every_kernel_is_launched_by_other_releases(version: str, tmp_path: Path) -> None:
    """The launch path of each release binds, specializes and compiles every kernel; pip installs the release."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    package = "triton" if version == "newest" else f"triton=={version}"
    # The constraints of this project's own tests would forbid the other releases.
    environment = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    installed = subprocess.run([*install, package], env=environment, capture_output=True, text=True, timeout=600)
    if installed.returncode:
        pytest.skip(f"{package} cannot be installed here: {installed.stderr[-300:]}")
    environment |= {"PYTHONPATH": str(tmp_path / "packages"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    script = Path(__file__).parents[1] / "helpers" / "launch_versions.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found, _, launched = done.stdout.partition(" ")
    assert found == version or version == "newest"
    assert launched.strip() == "{'extrapolate': 18, 'sweep': 36, 'whole_model': 18}"
