"""These tests check which engine is chosen and why, and how engines of different kinds share one queue."""

from __future__ import annotations

import re
import sys
import threading
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import expo
from expo.demo import ALIGNED, SFT
from expo.execution import engines
from expo.execution.engines import Engine, choose, engines_for
from expo.execution.lanes import ring_slots
from expo.execution.worker_pool import chunk_size
from expo.fast import _summary
from expo.kernels import numerics
from expo.kernels.contract import Statistics
from expo.memory import MIB
from expo.merging import job
from expo.options import MAX_ALPHAS


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `expo.kernels.cpu` impossible to import, as if the C extension had not been compiled."""
    pytest.importorskip("expo.kernels.cpu")
    monkeypatch.delattr("expo.kernels.cpu")
    monkeypatch.setitem(sys.modules, "expo.kernels.cpu", None)


def test_auto_is_the_compiled_engine() -> None:
    pytest.importorskip("expo.kernels.cpu")
    assert choose()[:3:2] == ("cpu", "compiled, as fast as memory")
    assert choose("cpu", "cpu")[:3:2] == ("cpu", "asked for")
    assert choose("numpy")[:3:2] == ("numpy", "asked for")


@pytest.mark.usefixtures("not_built")
def test_numpy_takes_over_by_itself_and_a_named_engine_does_not() -> None:
    assert choose()[:3:2] == ("numpy", "the compiled engine is not built")
    with pytest.raises(expo.EngineError, match=r"not built .*`engine='numpy'`"):
        choose("cpu")


def test_triton_without_a_gpu_says_so() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for engine, device in (("triton", "auto"), ("auto", "cuda"), ("triton", "cuda:0")):
        with pytest.raises(expo.EngineError, match=r"cannot run here: torch sees no CUDA device; `engine='cpu'`"):
            choose(engine, device)


@pytest.mark.parametrize(
    ("engine", "device"), [("triton", "auto"), ("triton", "cuda"), ("auto", "cuda"), ("triton", "cuda:2")]
)
def test_a_gpu_without_an_index_is_the_current_one_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, engine: str, device: str
) -> None:
    """Torch has a current GPU for each thread, and the threads of the lanes start with GPU 0."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from expo.kernels import device as gpu
    from expo.kernels import extrapolate, host, selftest

    if extrapolate.interpreted():
        pytest.skip("the interpreter takes the GPU's place")
    caller, named = threading.current_thread(), []

    def made(name: str) -> SimpleNamespace:
        named.append(name)
        return SimpleNamespace(device=name)

    monkeypatch.setattr(gpu, "why_unavailable", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(threading.current_thread() is caller))
    monkeypatch.setattr(gpu, "Cuda", made)
    monkeypatch.setattr(host, "HostEngine", made)
    monkeypatch.setattr(selftest, "check", lambda _: None)
    chosen, expected = choose(engine, device), "cuda:2" if device == "cuda:2" else "cuda:1"
    assert named == [expected] * 2
    assert chosen.gpu.device == expected
    assert chosen.why == f"asked for, on {expected}"


@pytest.mark.parametrize(
    ("engine", "device", "said"),
    [
        ("fortran", "auto", "'fortran'"),
        ("auto", "tpu", "'tpu'"),
        ("auto", "cuda:x", "'cuda:x'"),
        ("triton", "cpu", "`engine='triton'` computes on a GPU, but `device` is cpu"),
        ("numpy", "cuda", "`engine='numpy'` computes on the CPU, but `device` is cuda"),
        ("cpu", "cuda:1", "`engine='cpu'` computes on the CPU, but `device` is cuda:1"),
    ],
)
def test_names_that_make_no_sense(engine: str, device: str, said: str) -> None:
    with pytest.raises(expo.UsageError, match=said):
        choose(engine, device)


@pytest.mark.parametrize(("processors", "workers"), [(1, 2), (2, 3), (64, 8)])
def test_workers_on_the_cpu(monkeypatch: pytest.MonkeyPatch, processors: int, workers: int) -> None:
    monkeypatch.setattr(engines, "cpu_count", lambda: processors)
    assert engines_for() == (choose(),) * workers
    assert engines_for("numpy") == (choose("numpy"),) * workers


@pytest.mark.parametrize(
    ("engine", "device", "names"),
    [
        ("auto", "cuda", ["triton"] * 2 + [choose().name] * 3),
        ("triton", "auto", ["triton"] * 2),
        ("triton", "cuda:1", ["triton"] * 2),
        ("auto", "auto", [choose().name] * 3),
    ],
)
def test_workers_with_a_gpu(monkeypatch: pytest.MonkeyPatch, engine: str, device: str, names: list[str]) -> None:
    """A device without an engine adds the GPU to the CPU; engine="triton" takes the GPU alone; auto takes no GPU."""
    gpu = Engine("triton", numerics.extrapolate, "a test's", gpu=object())
    monkeypatch.setattr(engines, "_triton", lambda device: gpu)
    monkeypatch.setattr(engines, "cpu_count", lambda: 2)
    assert [each.name for each in engines_for(engine, device)] == names


@pytest.mark.parametrize(
    ("processors", "processes", "workers", "slots"),
    [(1, 1, 2, 3), (2, 1, 2, 3), (5, 1, 5, 3), (6, 1, 6, 2), (64, 1, 8, 2), (64, 8, 8, 2), (16, 8, 2, 3), (4, 8, 2, 3)],
)
def test_workers_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, processors: int, processes: int, workers: int, slots: int
) -> None:
    """A GPU has more workers where there are more processors, and then each of them has fewer slots."""
    gpu = Engine("triton", numerics.extrapolate, "a test's", gpu=object())
    monkeypatch.setattr(engines, "_triton", lambda device: gpu)
    monkeypatch.setattr(engines, "cpu_count", lambda: processors)
    assert engines_for("triton", "auto", processes) == (gpu,) * workers
    assert ring_slots((gpu,) * workers) == slots
    assert ring_slots(engines_for("auto", "cuda", processes)) == slots


def test_pinned_memory_is_bounded() -> None:
    """The rings of a process have at most 256 MiB, where sft has four bytes for each two of aligned."""
    gpu, cpu = Engine("triton", numerics.extrapolate, "a test's", gpu=object()), choose()
    for on_gpu, on_cpu, outputs in product(range(2, 9), range(9), range(1, MAX_ALPHAS + 1)):
        crew = (gpu,) * on_gpu + (cpu,) * on_cpu
        chunk = chunk_size(len(crew), outputs)
        assert on_gpu * ring_slots(crew) * chunk * (2 + 1 + outputs) <= 256 * MIB


def meeting(engine: Engine, here: threading.Event, there: threading.Event) -> Engine:
    """Return the engine; each of its calls waits until an engine of the other kind has begun a chunk too."""

    def run(*arguments: Any) -> Statistics | None:
        here.set()
        assert there.wait(30)
        return engine.run(*arguments)

    return engine._replace(run=run)


def test_engines_of_two_kinds_share_one_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes do not depend on the engine that computes a chunk, and the engines' shares add up to all bytes."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 64 << 10)
    alone = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "alone")
    first, second = threading.Event(), threading.Event()
    other = meeting(Engine("other", numerics.extrapolate, "a test's"), second, first)
    monkeypatch.setattr(job, "engines_for", lambda *_: (meeting(choose(), first, second), other))
    shared = expo.merge(SFT, ALIGNED, 0.3, tmp_path / "shared")
    assert set(shared.shares) == {alone.engine, "other"}
    assert min(shared.shares.values()) > 0
    assert sum(shared.shares.values()) == alone.bytes_written == shared.bytes_written
    assert re.search(r"workers \(.*\); \w+ \d+%, other \d+% of the bytes; written", "\n".join(_summary(shared)))
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes()
