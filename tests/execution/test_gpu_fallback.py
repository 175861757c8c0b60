"""These tests use GPUs whose kernels give wrong bits, do not compile, or do not launch.

The first use of a kernel must notice this, one warning must tell it, and torch or the CPU must compute instead. The GPU
is simulated (`software_gpu`), and tensors on the CPU take the place of a GPU's tensors.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import random_tensors, write_folder
from engine_calls import run_engine

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

import late
import triton
from software_gpu import SoftwareGpu

import expo
from expo import op
from expo.demo import ALIGNED, SFT
from expo.execution import engines
from expo.execution import gpu_fallback as gpu
from expo.execution import gpu_lane as ring
from expo.execution.engines import choose, engines_for
from expo.fast import main
from expo.kernels import extrapolate, numerics, selftest, sweep, whole_model
from expo.kernels.contract import Operand, Term, tensor_extrapolation, working_alpha
from expo.tensors import gpu_calls, gpu_tensors, live, originals

if extrapolate.interpreted():
    pytest.skip("the interpreter takes the GPU's place", allow_module_level=True)

CPU = torch.device("cpu")
READ_ONLY = OSError(30, "Read-only file system")
TESTED = ["extrapolate", "sweep", "sweep", "whole_model", "extrapolate"]  # the launches of the self-test


class CompilationError(Exception):
    """An error like Triton's CompilationError, which is no subclass of RuntimeError."""


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Forget all tests and failures of kernels, and let tensors on the CPU count as a GPU's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(selftest, "_passed", set())
    monkeypatch.setattr(gpu, "_given_up", {})
    monkeypatch.setattr(gpu, "_ran_out", set())
    gpu._selftest.cache_clear()
    gpu_calls.tables.clear()
    monkeypatch.setattr(gpu_tensors, "on_gpu", lambda _: True)
    monkeypatch.setattr(live, "_on_cpu", lambda weight: not gpu_tensors.on_gpu(weight.out))


@pytest.fixture
def software() -> Iterator[SoftwareGpu]:
    with SoftwareGpu().active() as made:
        yield made


@pytest.fixture
def fusing() -> Iterator[SoftwareGpu]:
    """Yield a GPU whose assembler fuses products and sums, even if the PTX forbids it."""
    with SoftwareGpu(rewrite=fused).active() as made:
        yield made


def fused(text: str) -> str:
    """Return the PTX with each product and the sum that uses it as one instruction, which rounds once."""
    products = dict(re.findall(r"mul\.rn\.f32\s+(%\w+), (%\w+, %\w+);", text))

    def sum_of(match: re.Match[str]) -> str:
        to, x, y = match.groups()
        if y in products:
            x, y = y, x
        return f"fma.rn.f32 {to}, {products[x]}, {y};" if x in products else match[0]

    return re.sub(r"add\.rn\.f32\s+(%\w+), (%\w+), (%\w+);", sum_of, text)


def pair(n: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n)
    return torch.randn(n).bfloat16(), torch.randn(n).bfloat16()


def expected(sft: torch.Tensor, aligned: torch.Tensor, alpha: float = 0.3) -> torch.Tensor:
    out = torch.empty_like(aligned)
    s, a, o = (each.view(torch.int16).numpy() for each in (sft, aligned, out))
    run_engine(numerics.extrapolate, s, a, ("BF16", "BF16"), [o], [working_alpha(alpha)])
    return out


# The self-test


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_element_tells_fused_from_not(dtype: str) -> None:
    """Exact arithmetic with two roundings gives the expected bits, and with one rounding it gives others."""
    import exact

    integer = torch.int16 if dtype == "BF16" else torch.int32
    unsigned = np.uint16 if dtype == "BF16" else np.uint32
    bits = [each.view(integer).numpy().view(unsigned).tolist() for each in selftest.elements(dtype)]
    kinds = set(zip(*bits, strict=True))
    assert len(kinds) == selftest.STEPS
    for s, a, r in kinds:
        assert exact.extrapolate(s, dtype, a, dtype, selftest.ALPHA) == r
        assert exact.extrapolate(s, dtype, a, dtype, selftest.ALPHA, fused=True) != r


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_kernels_pass_once(arch: int) -> None:
    with SoftwareGpu(arch).active() as software:
        for _ in range(2):
            selftest.check(CPU)
    assert [name for name, _ in software.launches] == TESTED


def test_an_assembler_that_fuses_is_noticed(fusing: SoftwareGpu) -> None:
    for _ in range(2):  # the test of a device that failed is repeated
        with pytest.raises(RuntimeError, match=r"kernel extrapolate gives wrong bits for \d+ .* as if .* were fused"):
            selftest.check(CPU)
    assert len(fusing.launches) == 2 * (len(TESTED) - 1)


@pytest.mark.parametrize("kernel", ["extrapolate", "sweep", "whole_model"])
def test_each_kernel_is_tested(kernel: str) -> None:
    def rewrite(text: str) -> str:
        return fused(text) if f".entry {kernel}(" in text else text

    with SoftwareGpu(rewrite=rewrite).active(), pytest.raises(RuntimeError, match=f"the kernel {kernel} gives wrong"):
        selftest.check(CPU)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (lambda text: ".entry extrapolate(" in text and "bf16" not in text, "extrapolate for fp32"),
        (
            lambda text: ".entry sweep(" in text and text.partition(")")[0].count(".param") == 8,
            "sweep without statistics",
        ),
    ],
    ids=["fp32", "without statistics"],
)
def test_each_form_is_tested(form: Callable[[str], bool], name: str) -> None:
    with (
        SoftwareGpu(rewrite=lambda text: fused(text) if form(text) else text).active(),
        pytest.raises(RuntimeError, match=f"the kernel {name} gives wrong bits .* as if products and sums were fused"),
    ):
        selftest.check(CPU)


def test_a_compiler_that_may_fuse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM fuses a plain product if it is allowed to, but no product in inline assembly, which NVIDIA's GPUs get."""

    def rounding(text: str) -> str:
        return re.sub(r"\b(sub|mul|add)\.f32\b", r"\1.rn.f32", text)  # without .rn the interpreter refuses them

    monkeypatch.setitem(extrapolate.OPTIONS, "enable_fp_fusion", True)
    with SoftwareGpu(rewrite=rounding).active():
        selftest.check(CPU)
        monkeypatch.setattr(selftest, "_passed", set())
        for module in (extrapolate, sweep, whole_model):
            monkeypatch.setattr(module, "ptx", lambda: False)
        with pytest.raises(RuntimeError, match="as if products and sums were fused"):
            selftest.check(CPU)


def test_wrong_statistics_are_noticed(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "statistics", lambda _: numerics.Statistics(1.0, 1.0, 1.0, ((0, 0),)))
    with pytest.raises(RuntimeError, match="sweep gives wrong statistics"):
        selftest.check(CPU)


def test_threads_wait_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    go = threading.Event()

    def slow(device: Any) -> None:
        runs.append(device)
        assert go.wait(30)

    monkeypatch.setattr(selftest, "_run", slow)
    threads = [threading.Thread(target=selftest.check, args=(CPU,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    threads[0].join(0.1)
    assert all(thread.is_alive() for thread in threads), "a thread did not wait for the test"
    go.set()
    for thread in threads:
        thread.join(30)
    assert runs == [CPU]


def test_a_kernel_is_compiled_once_and_by_one_thread_at_a_time(
    software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python 3.11 fails where two threads parse source code together, and eight threads need each kernel once."""
    kernel, parsing = type(extrapolate.extrapolate), threading.Lock()
    parse, compiled = kernel.parse, []

    def parse_alone(function: Any) -> Any:
        assert parsing.acquire(blocking=False), "two threads compile at the same time"
        try:
            time.sleep(0.001)  # lets the other threads run
            return parse(function)
        finally:
            parsing.release()

    monkeypatch.setattr(kernel, "parse", parse_alone)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["fn"].name))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sft, aligned = pair()
    outs = [torch.empty_like(aligned) for _ in range(8)]
    errors: list[Exception] = []

    def launch(out: torch.Tensor) -> None:
        try:
            start.wait(30)
            extrapolate.launch(*tensor_extrapolation(sft, aligned, (working_alpha(0.3),)), [out])
        except Exception as error:
            errors.append(error)

    start = threading.Barrier(len(outs))
    threads = [threading.Thread(target=launch, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert all(torch.equal(out.view(torch.int16), expected(sft, aligned).view(torch.int16)) for out in outs)
    assert len(compiled) == 1


# Torch computes tensors instead


def by_function() -> tuple[torch.Tensor, torch.Tensor]:
    s, a = pair()
    out = torch.empty_like(a)
    gpu_tensors.compute(s, a, working_alpha(0.3), out)
    return out, expected(s, a)


def by_list() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [pair(n) for n in (3000, 5, 2049)]
    outs = expo.extrapolate([s for s, _ in pairs], [a for _, a in pairs], 0.3)
    return torch.cat(outs), torch.cat([expected(s, a) for s, a in pairs])


def by_operator() -> tuple[torch.Tensor, torch.Tensor]:
    s, a = pair()
    (out,) = expo.extrapolate([s], [a], 0.3, out=[a.clone()])
    assert torch.equal(op.extrapolate(s, a, 0.3), out)
    return out, expected(s, a)


def by_live() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a live model that is rewritten for two alphas; each alpha is applied to the original weights."""
    models = [torch.nn.Linear(70, 50, dtype=torch.bfloat16) for _ in range(2)]
    s, a = (model.weight.detach().clone() for model in models)
    held = live.Live(models[1], models[0])
    for alpha in (0.7, 0.3):
        held.alpha = alpha
    return models[1].weight.detach().reshape(-1), expected(s.reshape(-1), a.reshape(-1))


every_way = pytest.mark.parametrize("way", [by_function, by_list, by_operator, by_live], ids=lambda f: f.__name__)
Way = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@every_way
def test_kernels_that_pass_are_used(way: Way, software: SoftwareGpu) -> None:
    found, right = way()
    assert torch.equal(found, right)
    assert len(software.launches) > len(TESTED)


@every_way
def test_wrong_bits(way: Way, fusing: SoftwareGpu) -> None:
    with pytest.warns(RuntimeWarning, match=r"not used on cpu; .*: the kernel extrapolate gives wrong bits") as said:
        found, right = way()
    assert len(said) == 1
    assert torch.equal(found, right)
    way()  # a second warning would be an error here
    assert len(fusing.launches) == len(TESTED) - 1


@every_way
def test_no_compiler(way: Way, software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes if a kernel does not compile; Triton's errors share no class with a GPU's other errors."""

    monkeypatch.setattr(software, "launcher_cls", failing(CompilationError("at 7:12: no such instruction")))
    with pytest.warns(RuntimeWarning, match="CompilationError: at 7:12") as said:
        found, right = way()
    assert len(said) == 1
    assert torch.equal(found, right)


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's error."""


MEMORY = (OutOfMemoryError("CUDA: no room for 2 GiB"), RuntimeError("Triton Error [CUDA]: out of memory"))
every_lack = pytest.mark.parametrize("lack", MEMORY, ids=lambda error: type(error).__name__)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@every_way
@every_lack
@pytest.mark.parametrize("where", ["the self-test", "a launch", "a table"])
def test_a_lack_of_memory_passes(
    way: Way, lack: Exception, where: str, software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch computes while memory is short, one warning says so, and the kernels compute afterwards."""
    with monkeypatch.context() as short, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if where == "the self-test":
            short.setattr(selftest, "_run", failing(lack))
        else:
            selftest.check(CPU)
            target, name = (software, "launcher_cls") if where == "a launch" else (whole_model, "rows")
            short.setattr(target, name, failing(lack))
        for _ in range(2):
            found, right = way()
            assert torch.equal(found, right)
    needed = where != "a table" or way in (by_list, by_operator, by_live)  # one tensor needs no table
    assert [str(each.message).partition(";")[0] for each in caught] == [
        "the Triton kernels are not used where memory runs out"
    ] * needed
    assert gpu.reason_given_up(CPU) == ""
    before = len(software.launches)
    found, right = way()
    assert torch.equal(found, right)
    assert len(software.launches) > before


def test_a_table_is_made_when_there_is_memory_again(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live model makes its table when it is rewritten for another alpha, once there is memory again."""
    models = [torch.nn.Linear(70, 50, dtype=torch.bfloat16) for _ in range(2)]
    held = live.Live(models[1], models[0])
    with monkeypatch.context() as short:
        short.setattr(whole_model, "rows", failing(MEMORY[0]))
        with pytest.warns(RuntimeWarning, match="where memory runs out"):
            held.alpha = 0.7
    assert "whole_model" not in [name for name, _ in software.launches[len(TESTED) :]]
    held.alpha = 0.3
    assert software.launches[-1][0] == "whole_model"


def on_device(name: str) -> type[torch.Tensor]:
    """Return a class of tensors in the host's memory that say that they are on another device."""
    return type("Placed", (torch.Tensor,), {"device": property(lambda _: torch.device(name))})


def test_a_live_model_on_several_devices_has_a_table_for_each(
    software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's device_map spreads a model; the host's memory takes the place of two GPUs' memory."""
    sizes: dict[torch.device, int] = {}

    def allocate(size: int, keep: str, device: torch.device, pinned: bool) -> torch.Tensor:
        assert (keep, {gpu.type for gpu in pinned}) == ("device", {"cuda"})
        sizes[device] = size
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(live, "_on_cpu", lambda weight: weight.out.device.type == "cpu")
    monkeypatch.setattr(originals, "_free_bytes", lambda *_: ("a GPU", None))
    monkeypatch.setattr(originals, "_allocate", allocate)
    places = ("cuda:0", "cuda:1", "cpu", "cuda:0", "cuda:1")
    models = [torch.nn.ModuleList(torch.nn.Linear(70, 50, dtype=torch.bfloat16) for _ in places) for _ in range(2)]
    right = [
        expected(s.detach().reshape(-1), a.detach().reshape(-1), 1.5 if name == "0.bias" else 0.7)
        for s, (name, a) in zip(models[0].parameters(), models[1].named_parameters(), strict=True)
    ]
    for model in models:
        for layer, place in zip(model, places, strict=True):
            if place != "cpu":
                for name, tensor in list(layer.named_parameters()):
                    placed = tensor.detach().as_subclass(on_device(place))  # type: ignore[arg-type]
                    setattr(layer, name, torch.nn.Parameter(placed))
    with live.Live(models[1], models[0], alpha_for={"0.bias": 1.5}) as held:
        assert held.memory == sum(each.nbytes for each in models[1].parameters())
        assert {str(device): size for device, size in sizes.items()} == {
            place: sum(each.nbytes + -each.nbytes % 64 for layer in layers for each in layer.parameters())
            for place, layers in (
                ("cuda:0", [models[1][0], models[1][3]]),
                ("cuda:1", [models[1][1], models[1][4]]),
                ("cpu", [models[1][2]]),
            )
        }
        for _ in range(2):
            held.alpha = 0.7
        assert [name for name, _ in software.launches].count("whole_model") == 1 + 2 * 3  # one in the self-test
        tables = [("cuda:0", None), ("cuda:0", 1.5), ("cuda:1", None)]
        assert sorted(((str(device), own) for device, own, _ in held._tables), key=str) == sorted(tables, key=str)
        for parameter, bits in zip(models[1].parameters(), right, strict=True):
            assert torch.equal(parameter.detach().reshape(-1), bits)


@every_way
def test_an_untested_kernel_is_not_captured(way: Way, software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes in a capture, without a test or a warning; after a call outside a capture the kernels compute."""
    monkeypatch.setattr(gpu, "capturing", lambda _: True)
    found, right = way()
    assert torch.equal(found, right)
    assert (software.launches, selftest._passed, gpu.reason_given_up(CPU)) == ([], set(), "")
    monkeypatch.setattr(gpu, "capturing", lambda _: False)
    way()
    before = len(software.launches)
    monkeypatch.setattr(gpu, "capturing", lambda _: True)
    found, right = way()
    assert torch.equal(found, right)
    names = {name for name, _ in software.launches[before:]}
    assert names == {"extrapolate"}, "a table is made by a copy from the host, which is not captured"


def test_a_launch_that_fails_in_a_capture(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails in a capture raises its error, and the kernels are still used afterwards."""
    selftest.check(CPU)
    monkeypatch.setattr(gpu, "capturing", lambda _: True)
    text = "operation not permitted when stream is capturing"
    with monkeypatch.context() as broken:
        broken.setattr(extrapolate, "launch_tensors", failing(RuntimeError(text)))
        with pytest.raises(RuntimeError, match=text):
            by_function()
    assert gpu.reason_given_up(CPU) == ""
    found, right = by_function()
    assert torch.equal(found, right)


def test_amds_gpus_take_no_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extrapolate.ptx()
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    assert not extrapolate.ptx()


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "expo.kernels.selftest", None)
    monkeypatch.delattr("expo.kernels.selftest")
    with pytest.warns(RuntimeWarning, match="not used on cpu"):
        found, right = by_list()
    assert torch.equal(found, right)


def test_a_later_group_fails_and_the_first_is_not_done_twice(
    software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch must not compute a group again that a launch has computed in place."""
    s, a = pair(3000)
    halves = s.half(), a.half()
    sft, aligned = [s, halves[0]], [a.clone(), halves[1].clone()]
    launch = whole_model.Group.launch

    def failing(self: whole_model.Group, alpha: float) -> None:
        if self.places == [1]:
            raise RuntimeError("no memory for the kernel's code")
        launch(self, alpha)

    monkeypatch.setattr(whole_model.Group, "launch", failing)
    with pytest.warns(RuntimeWarning, match="no memory for the kernel's code"):
        expo.extrapolate(sft, aligned, 0.3, out=aligned)
    assert torch.equal(aligned[0], expected(s, a))
    wide = halves[1].float()
    assert torch.equal(aligned[1], (wide + (wide - halves[0].float()) * working_alpha(0.3)).half())


# The CPU computes merges instead, unless the user named the engine


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make merges use a lane on a device that runs late and an engine over host memory; both use the simulated GPU."""
    from expo.kernels import device, host

    class Device(late.Late):
        def __init__(self, name: str) -> None:
            super().__init__(getattr(late.Late, "begins", "needed"))
            self.device = CPU

    monkeypatch.setattr(device, "resolve", lambda name: name)
    monkeypatch.setattr(device, "Cuda", Device)
    monkeypatch.setattr(host, "why_unavailable", lambda: "")
    made = host.HostEngine
    monkeypatch.setattr(host, "HostEngine", lambda _: made("cpu"))
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 64 << 10)
    monkeypatch.setattr(ring, "LEAST_GPU_BYTES", 1 << 10)
    monkeypatch.setattr(engines, "cpu_count", lambda: 1)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let merges compile no kernels before they stage an output, so that a failure of a kernel comes in a lane."""
    monkeypatch.setattr("expo.merging.job.compile_kernels", lambda engines, plan: engines)


def two_of(engine: str) -> Callable[..., tuple[Any, ...]]:
    """Return a replacement for `engines_for`: two engines on a GPU, each with its own device.

    A late device is for one thread, so they cannot share one.
    """
    return lambda *_: tuple(choose(engine, "cuda") for _ in range(2))


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file except the card, which names the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("right") / "out"
    expo.merge(SFT, ALIGNED, 0.3, folder)
    return files(folder)


@pytest.mark.usefixtures("merging")
def test_a_merge_by_kernels(
    software: SoftwareGpu, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("triton"))
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", engine="triton")
    assert files(tmp_path / "out") == right
    assert merged.shares.keys() == {"triton", choose().name}  # the CPU computes pieces below LEAST_GPU_BYTES
    assert {name for name, _ in software.launches[len(TESTED) :]} == {"sweep"}


@pytest.mark.usefixtures("merging", "fusing")
def test_an_engine_asked_for_by_name_fails(tmp_path: Path) -> None:
    for device in ("auto", "cuda"):
        with pytest.raises(
            expo.EngineError, match=r"`engine='triton'` cannot be used on cpu: .* wrong .*`engine='cpu'`"
        ):
            choose("triton", device)
    with pytest.raises(expo.EngineError, match="wrong bits"):
        expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", engine="triton")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("merging", "fusing")
def test_a_device_alone_gives_way_to_the_cpu(right: dict[str, bytes], tmp_path: Path) -> None:
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", device="cuda")
    (note,) = (note for note in merged.warnings if "wrong bits" in note)
    assert note.startswith(f"the Triton kernels are not used on cpu; `engine={choose().name!r}` computes instead")
    assert merged.engine == choose().name
    assert files(tmp_path / "out") == right
    assert [each.name for each in engines_for("auto", "cuda")] == [choose().name] * 2
    with pytest.warns(RuntimeWarning, match="wrong bits"):
        assert [name for name, _ in expo.stream(SFT, ALIGNED, 0.3, device="cuda")]


@pytest.mark.usefixtures("merging", "fusing")
def test_the_command_line_warns_as_it_always_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--sft", str(SFT), "--aligned", str(ALIGNED), "--alpha", "0.3", "--device", "cuda"]
    assert main([*pair, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "wrong bits" in line)
    assert line.startswith("expo: warning: the Triton kernels are not used on cpu; ")
    assert main([*pair, "--out", str(tmp_path / "other"), "--plan"]) == 0
    assert "note: the Triton kernels are not used on cpu; " in capsys.readouterr().out


@pytest.mark.usefixtures("merging", "compiled")
@pytest.mark.parametrize("order", ["needed", "at once"])  # the kernels run when a chunk is finished, or begun
@pytest.mark.parametrize("good", [0, 2])
def test_a_gpu_that_fails_in_the_middle(
    software: SoftwareGpu, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int,
    order: str,
) -> None:  # fmt: skip
    """The CPU computes the chunks that the GPU had begun, and they count as the CPU's; no Python warning is raised."""
    selftest.check(CPU)
    launch, calls, closed = sweep.launch, iter(range(1000)), []

    def launched(*arguments: Any) -> None:
        if next(calls) >= good:
            raise RuntimeError("CUDA error: unspecified launch failure")
        launch(*arguments)

    monkeypatch.setattr(sweep, "launch", launched)
    monkeypatch.setattr(late.Late, "begins", order, raising=False)
    close = ring.GpuLane.close
    monkeypatch.setattr(ring.GpuLane, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("auto"))
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    assert [note for note in merged.warnings if "unspecified" in note] == [
        f"cpu failed, and `engine={choose().name!r}` computed its part of the output, with the same bits. "
        "The reason: CUDA error: unspecified launch failure"
    ]
    assert len(closed) == 2
    assert files(tmp_path / "out") == right
    assert merged.shares[choose().name] > 0
    assert sum(merged.shares.values()) == merged.bytes_written
    assert gpu.reason_given_up(CPU) == "", "a failure of the lane must not give up the kernels for tensors"


@pytest.mark.usefixtures("merging", "software")
def test_a_ring_for_which_there_is_no_memory(
    right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late.Late, "pinned", failing(MEMORY[0]))
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("auto"))
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    assert [note for note in merged.warnings if note.endswith("The reason: CUDA: no room for 2 GiB")] != []
    assert files(tmp_path / "out") == right
    assert (gpu.reason_given_up(CPU), gpu._ran_out) == ("", set())


@pytest.mark.usefixtures("merging", "compiled", "software")
def test_a_ring_that_cannot_be_drained_is_kept(
    right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane that cannot be drained is kept, because freeing the memory of a GPU in a failed state ends the process."""
    kept: list[Any] = []
    selftest.check(CPU)
    monkeypatch.setattr(ring, "_undrained", kept)
    monkeypatch.setattr(sweep, "launch", failing(RuntimeError("CUDA error: unspecified launch failure")))
    monkeypatch.setattr(late.Late, "drain", failing(RuntimeError("CUDA error: unspecified launch failure")))
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("auto"))
    expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    assert [type(each) for each in kept] == [ring.GpuLane] * 2
    assert files(tmp_path / "out") == right


@pytest.mark.usefixtures("merging", "software")
def test_a_merge_does_not_use_kernels_that_tensors_gave_up(right: dict[str, bytes], tmp_path: Path) -> None:
    selftest.check(CPU)
    with pytest.warns(RuntimeWarning, match="not used on cpu; .*CompilationError"):
        gpu.fall_back(CPU, CompilationError("at 7:12"))
    with pytest.raises(
        expo.EngineError, match=r"^`engine='triton'` cannot be used on cpu: CompilationError: at 7:12; "
    ):
        choose("triton", "cuda")
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out", device="cuda")
    assert merged.engine == choose().name
    assert [note for note in merged.warnings if note.endswith("CompilationError: at 7:12")] != []
    assert files(tmp_path / "out") == right


@pytest.mark.usefixtures("merging")
def test_a_stream_goes_on(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.kernels import host

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    plain = dict(expo.stream(SFT, ALIGNED, 0.3))
    by_gpu = dict(expo.stream(SFT, ALIGNED, 0.3, device="cuda"))
    assert any(name == "sweep" for name, _ in software.launches[len(TESTED) :])
    monkeypatch.setattr(host, "launch", fail)
    with pytest.warns(RuntimeWarning, match="unspecified launch failure"):
        fallen = dict(expo.stream(SFT, ALIGNED, 0.3, device="cuda"))
    for name, tensor in plain.items():
        assert torch.equal(tensor, by_gpu[name])
        assert torch.equal(tensor, fallen[name])


@pytest.mark.usefixtures("merging", "compiled", "software")
@pytest.mark.parametrize("error", [CompilationError("at 7:12"), READ_ONLY, RuntimeError("x")], ids=repr)
def test_an_engine_asked_for_by_name_fails_by_an_error_of_ours(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every error of the named engine becomes an EngineError, also those of the compiler and of its cache folder."""
    from expo.kernels import host

    engine = choose("triton", "cuda")
    text = re.escape(gpu.error_text(error))
    monkeypatch.setattr(sweep, "launch", failing(error))
    monkeypatch.setattr(host, "launch", failing(error))
    monkeypatch.setattr("expo.merging.job.engines_for", lambda *_: (engine,))
    with pytest.raises(expo.EngineError, match=f"`engine='triton'` failed: {text}"):
        expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    with pytest.raises(expo.EngineError, match=rf"`engine='triton'` failed on \S+: {text}"):
        dict(expo.stream(SFT, ALIGNED, 0.3, engine="triton"))


@pytest.mark.usefixtures("merging", "compiled", "software")
def test_a_cache_that_cannot_be_written_to_is_no_input(
    right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU computes instead if Triton raises an OSError, which does not count as an error of an input."""
    selftest.check(CPU)
    monkeypatch.setattr(sweep, "launch", failing(READ_ONLY))
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("auto"))
    merged = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    assert [note for note in merged.warnings if note.endswith(f"The reason: OSError: {READ_ONLY}")] != []
    assert files(tmp_path / "out") == right


SHAPES = {
    "odd": ("BF16", (1203,)),  # the tensors after this one start at no multiple of 16 bytes
    "q": ("BF16", (64, 64)),
    "half": ("F16", (77, 51)),
    "narrow": ("BF16", (40, 41)),
    "full": ("F32", (40, 41)),
    "double": ("F64", (30, 31)),
    "bias": ("F16", (3,)),
}
# The dtypes of sft and of aligned and the number of outputs of each kernel; "double" and "bias" need no kernel.
KERNELS = [("BF16", "BF16", 2), ("BF16", "BF16", 3), ("F16", "F16", 2), ("F32", "BF16", 2), ("F32", "F32", 2)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a pair with tensors of several dtypes."""
    folder = tmp_path_factory.mktemp("mixed")
    sft = write_folder(folder / "sft", random_tensors(SHAPES | {"narrow": ("F32", (40, 41))}, 1))
    return sft, write_folder(folder / "aligned", random_tensors(SHAPES, 2))


def merge_mixed(mixed: tuple[Path, Path], out: Path, **options: Any) -> expo.Merged:
    return expo.merge(*mixed, (0.3, 0.0, 0.5), out / "{alpha}", alpha_for={"q": 0.7}, **options)


@pytest.mark.usefixtures("merging", "software")
def test_kernels_are_compiled_before_the_lanes_start(
    mixed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that calls merge() compiles each kernel once, and a lane never compiles."""
    selftest.check(CPU)
    threads: list[threading.Thread] = []
    hook = lambda **_: threads.append(threading.current_thread())  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    monkeypatch.setattr("expo.merging.job.engines_for", two_of("triton"))
    merge_mixed(mixed, tmp_path / "gpu")
    assert threads == [threading.current_thread()] * len(KERNELS)
    monkeypatch.undo()
    merge_mixed(mixed, tmp_path / "cpu")
    for alpha in ("0.3", "0", "0.5"):
        assert files(tmp_path / "gpu" / alpha) == files(tmp_path / "cpu" / alpha)


FAILURES = [
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    RuntimeError("Internal Triton PTX codegen error"),
    FileNotFoundError(2, "No such file or directory", "gcc"),
    READ_ONLY,
    CompilationError("at 7:12"),
    MEMORY[0],
]
every_failure = pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)


@pytest.mark.usefixtures("merging")
@every_failure
def test_a_kernel_that_does_not_compile_ends_a_merge_before_it_stages(
    software: SoftwareGpu, mixed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    selftest.check(CPU)
    monkeypatch.setattr(software, "launcher_cls", failing(error))
    text = re.escape(f"`engine='triton'` cannot be used on cpu: {gpu.error_text(error)}; `engine='cpu'` needs no GPU")
    with pytest.raises(expo.EngineError, match=f"^{text}$"):
        merge_mixed(mixed, tmp_path / "out", engine="triton")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("merging")
@every_failure
def test_the_cpu_takes_over_if_a_kernel_does_not_compile(
    software: SoftwareGpu, mixed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    selftest.check(CPU)
    monkeypatch.setattr(software, "launcher_cls", failing(error))
    merged = merge_mixed(mixed, tmp_path / "out", device="cuda")
    assert [note for note in merged.warnings if "Triton" in note] == [
        f"the Triton kernels are not used on cpu; `engine={choose().name!r}` computes instead, with the same bits. "
        f"The reason: {gpu.error_text(error)}"
    ]
    assert (merged.engine, merged.workers, merged.shares.keys()) == (choose().name, 2, {choose().name})


@pytest.mark.usefixtures("merging")
def test_doubles_are_no_concern_of_the_gpus(software: SoftwareGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes fp64, so an error there does not give the kernels up."""
    from expo.kernels import host

    engine = choose("auto", "cuda")
    monkeypatch.setattr(host.numerics, "extrapolate", failing(RuntimeError("numerics")))
    s, a, out = np.ones(5), np.full(5, 2.0), np.empty(5)
    before = len(software.launches)
    with pytest.raises(RuntimeError, match="numerics"):
        run_engine(engine.run, s.data, a.data, ("F64", "F64"), [out.data], [0.5])
    assert (gpu.reason_given_up(CPU), len(software.launches)) == ("", before)


@pytest.mark.usefixtures("merging")
def test_another_combination_does_not_give_the_kernels_up(software: SoftwareGpu) -> None:
    """The CPU's engine gets terms that no kernel computes, and its refusal does not give the kernels up."""
    engine = choose("auto", "cuda")
    o = Operand(np.ones(5, np.float32), "F32")
    before = len(software.launches)
    with pytest.raises(expo.EngineError, match="the engine cpu computes only aligned"):
        engine.run(o, [Term([1.0], o, o)] * 2, [np.empty(5, np.float32)], False)
    assert (gpu.reason_given_up(CPU), len(software.launches)) == ("", before)


def test_warnings_are_one_for_each_device() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for device in (torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0")):
            gpu.fall_back(device, RuntimeError("x"))
    assert [str(each.message).split(";")[0] for each in said] == [
        f"the Triton kernels are not used on cuda:{i}" for i in (0, 1)
    ]
