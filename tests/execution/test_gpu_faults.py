"""These tests let a simulated GPU fail: no memory for a ring, a launch that fails, an error that stays, a late error.

A merge by `engine="triton"` must end with an error of ours, and leave a staging folder from which a merge resumes. A
merge with an engine of the CPU in reserve must end with the right output and a note. No thread may be left, and none
may wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import contents, kept, random_tensors, staging_folder, write_folder

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this platform")

import late  # noqa: E402

import expo  # noqa: E402
from expo.execution import gpu_lane as ring  # noqa: E402
from expo.execution.engines import Engine, choose  # noqa: E402
from expo.fast import main  # noqa: E402
from expo.kernels import sweep  # noqa: E402
from expo.merging import job  # noqa: E402

ILLEGAL = "CUDA error: an illegal memory access was encountered"
LAUNCH = "CUDA error: too many resources requested for launch"
MEMORY = "CUDA out of memory. Tried to allocate 4.00 MiB"
SHAPES = {f"layers.{i}": ("BF16", (128, 64)) for i in range(12)}
CALLS = ("pinned", "memory", "stream", "enqueue", "record", "wait", "synchronize", "drain")


class Gpu:
    """A GPU that several workers share, each through a `Device` of its own.

    Attributes:
        error: The text of an error that stays: from now on every call raises it. "" if the GPU works.
    """

    def __init__(self, order: str | int = "needed") -> None:
        self.order = order
        self.error = ""

    def engines(self, reserve: Engine | None = None, workers: int = 2) -> tuple[Engine, ...]:
        def run(*_: Any) -> None:
            raise AssertionError("the lane does not call this function")

        return tuple(Engine("triton", run, "a test's", Device(self), reserve) for _ in range(workers))


def checked(name: str) -> Callable[..., Any]:
    """Return a method of `Device` that raises the GPU's error, if there is one before or after the call."""
    call = getattr(late.Late, name)

    def method(self: Device, *arguments: Any) -> Any:
        result = None if self.gpu.error else call(self, *arguments)
        if self.gpu.error:
            raise RuntimeError(self.gpu.error)
        return result

    return method


class Device(late.Late):
    """The simulated device of one worker."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu.order)
        self.gpu, self.device = gpu, "cuda:0"


for each in CALLS:
    setattr(Device, each, checked(each))


def fail_at(call: Callable[..., Any], number: int, fail: Callable[[], Any]) -> Callable[..., Any]:
    """Return the function with another result for the call of this number, counted from 0 in all threads."""
    calls = iter(range(10**6))

    def counted(*arguments: Any) -> Any:
        return fail() if next(calls) == number else call(*arguments)

    return counted


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def no_memory(patch: pytest.MonkeyPatch, gpu: Gpu, number: int) -> None:
    patch.setattr(Device, "pinned", fail_at(Device.pinned, number, raising(torch.OutOfMemoryError(MEMORY))))


def no_launch(patch: pytest.MonkeyPatch, gpu: Gpu, number: int) -> None:
    patch.setattr(sweep, "launch", fail_at(late.kernel, number, raising(RuntimeError(LAUNCH))))


def illegal_access(patch: pytest.MonkeyPatch, gpu: Gpu, number: int) -> None:
    """Let a kernel write nothing, and every later call of the device fail, as CUDA does after an illegal access."""
    patch.setattr(sweep, "launch", fail_at(late.kernel, number, lambda: setattr(gpu, "error", ILLEGAL)))


FAULTS = [
    pytest.param(fault, number, text, id=f"{fault.__name__}-{number}")
    for fault, numbers, text in (
        (no_memory, (0, 4, 11), MEMORY),  # the first allocation; one in the middle of a ring; one of another worker
        (no_launch, (0, 3), LAUNCH),
        (illegal_access, (0, 3), ILLEGAL),
    )
    for number in numbers
]
every_fault = pytest.mark.parametrize(("fault", "number", "text"), FAULTS)
every_order = pytest.mark.parametrize("order", ["needed", "at once", 5])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small model into many chunks, and let NumPy compute in place of the kernels."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 8 << 10)
    monkeypatch.setattr(ring, "LEAST_GPU_BYTES", 1 << 10)
    monkeypatch.setattr(ring, "_undrained", [])
    monkeypatch.setattr(sweep, "launch", late.kernel)
    monkeypatch.setattr(job, "compile_kernels", lambda engines, plan: engines)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    sft, aligned = (write_folder(folder / name, random_tensors(SHAPES, i)) for i, name in enumerate(("sft", "aligned")))
    return sft, aligned


@pytest.fixture
def right(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(job, "engines_for", lambda *_: (choose(),))
    expo.merge(*pair, 0.3, tmp_path / "right" / "out")
    return contents(tmp_path / "right" / "out")


def ended(work: Callable[[], Any]) -> Any:
    """Call the function in a thread; return its result or error, and assert that it leaves no thread behind."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    before = set(threading.enumerate())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the merge waits for ever"
    assert set(threading.enumerate()) <= before
    return results[0]


@every_fault
@every_order
def test_an_engine_asked_for_by_name(
    pair: tuple[Path, Path], right: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None], number: int, text: str, order: str | int,
) -> None:  # fmt: skip
    """The error names the engine and the fault, and a merge on the CPU resumes from the finished part."""
    gpu, out = Gpu(order), tmp_path / "folder" / "out"
    with monkeypatch.context() as patch:
        fault(patch, gpu, number)
        patch.setattr(job, "engines_for", lambda *_: gpu.engines())
        error = ended(lambda: expo.merge(*pair, 0.3, out))
    assert type(error) is expo.EngineError
    assert error.exit_code == 2
    kind = "OutOfMemoryError: " if type(error.__cause__).__name__ == "OutOfMemoryError" else ""
    assert str(error) == f"`engine='triton'` failed: {kind}{text}; {kept(out)}"
    assert list(out.parent.iterdir()) == [staging_folder(out)]
    assert all(type(lane) is ring.GpuLane for lane in ring._undrained)
    assert len(ring._undrained) <= 2 * (fault is illegal_access)
    resumed = expo.merge(*pair, 0.3, out, resume=True)
    assert resumed.resumed + sum(resumed.shares.values()) == resumed.bytes_written
    assert contents(out) == right


@every_fault
@every_order
def test_an_engine_of_the_cpu_in_reserve(
    pair: tuple[Path, Path], right: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None], number: int, text: str, order: str | int,
) -> None:  # fmt: skip
    """The CPU computes the rest, one note names the fault, and the output is right."""
    gpu = Gpu(order)
    with monkeypatch.context() as patch:
        fault(patch, gpu, number)
        patch.setattr(job, "engines_for", lambda *_: gpu.engines(choose()))
        merged = ended(lambda: expo.merge(*pair, 0.3, tmp_path / "out"))
    assert isinstance(merged, expo.Merged), merged
    assert contents(tmp_path / "out") == right
    (note,) = (note for note in merged.warnings if "failed" in note)
    assert note.startswith(f"cuda:0 failed, and `engine={choose().name!r}` computed its part of the output")
    assert note.endswith(text)
    assert sum(merged.shares.values()) == merged.bytes_written


def test_an_error_that_only_the_end_of_a_lane_meets(
    pair: tuple[Path, Path], right: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose chunks are all done may meet the error of another worker when it waits for its streams."""
    gpu = Gpu()
    monkeypatch.setattr(Device, "drain", raising(RuntimeError(ILLEGAL)))
    monkeypatch.setattr(job, "engines_for", lambda *_: gpu.engines(choose()))
    merged = ended(lambda: expo.merge(*pair, 0.3, tmp_path / "out"))
    assert isinstance(merged, expo.Merged), merged
    assert contents(tmp_path / "out") == right
    assert [note for note in merged.warnings if note.endswith(ILLEGAL)] != []
    assert len(ring._undrained) == 2


@pytest.mark.parametrize(("fault", "text"), [(no_memory, MEMORY), (no_launch, LAUNCH), (illegal_access, ILLEGAL)])
def test_the_command(
    pair: tuple[Path, Path], right: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], fault: Callable[..., None], text: str,
) -> None:  # fmt: skip
    """The command ends with exit code 2 and one line without a traceback; with --resume it finishes the output."""
    gpu, out = Gpu(), tmp_path / "out"
    words = ["--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3", "--out", str(out), "--quiet"]
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        fault(patch, gpu, 3)
        patch.setattr(job, "engines_for", lambda *_: gpu.engines())
        assert main([*words, "--engine", "triton"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("expo: error: --engine triton failed: ")
    assert text in line
    assert str(staging_folder(out)) in line
    assert threading.active_count() == threads
    assert main([*words, "--resume"]) == 0
    assert contents(out) == right
