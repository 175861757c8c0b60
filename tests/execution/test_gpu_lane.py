"""These tests run a GPU's lane on a simulated device that runs late, in any order that its events allow."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import ODD_SHAPES, contents, kept, random_tensors, staging_folder, write_folder

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this platform")

import late  # noqa: E402

import expo  # noqa: E402
from expo.execution import gpu_lane as ring  # noqa: E402
from expo.execution.engines import Engine, choose  # noqa: E402
from expo.kernels import sweep  # noqa: E402
from expo.merging import job, rank_worker  # noqa: E402

SEEDS = range(8)
SHAPES = {
    **ODD_SHAPES,
    "embed": ("BF16", (301, 97)),
    "q": ("BF16", (128, 128)),
    "half": ("F16", (77, 51)),
    "full": ("F32", (40, 41)),
    "double": ("F64", (30, 31)),
    "sft is wide": ("BF16", (60, 61)),
    "sft is narrow": ("F32", (60, 61)),
    "norm": ("BF16", (128,)),
    "kept": ("BF16", (90, 90)),
}
OTHER = {"sft is wide": "F32", "sft is narrow": "F16"}
RULES = {"kept": 0.0, "q": 0.25}
ALPHAS = (0.3, 0.0, 1.0)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small model into many chunks, nearly all for the GPU, and let NumPy compute in place of its kernels."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 16 << 10)
    monkeypatch.setattr(ring, "LEAST_GPU_BYTES", 1 << 10)
    monkeypatch.setattr(sweep, "launch", late.kernel)
    monkeypatch.setattr(job, "compile_kernels", lambda engines, plan: engines)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two checkpoints with tensors of every dtype, at odd offsets in the files."""
    folder = tmp_path_factory.mktemp("pair")
    sft_shapes = {name: (OTHER.get(name, dtype), shape) for name, (dtype, shape) in SHAPES.items()}
    sft = write_folder(folder / "sft", random_tensors(sft_shapes, 1), shards=2, pad=3)
    return sft, write_folder(folder / "aligned", random_tensors(SHAPES, 2), shards=3, pad=1)


def engine(device: Any) -> Engine:
    """Return an engine on a GPU; its function must never be called, because the lane computes the chunks."""

    def run(*_: Any) -> None:
        raise AssertionError("the lane does not call this function")

    return Engine("triton", run, "a test's", device)


def merged(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], out: Path, crew: tuple[Engine, ...], **more: Any
) -> expo.Merged:
    monkeypatch.setattr(job, "engines_for", lambda *_: crew)
    return expo.merge(*pair, ALPHAS, str(out / "{alpha}"), alpha_for=RULES, **more)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path) -> Any:
    """Return the files and their digests of the same merge on the CPU, and the report of merge()."""
    report = merged(monkeypatch, pair, tmp_path / "plain", (choose(),))
    return contents(tmp_path / "plain"), report


def poisoning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite a slot's outputs as soon as the sink has written them."""
    sink = rank_worker.RankWorker._write

    def spoil(self: rank_worker.RankWorker, k: int, chunk: Any, data: memoryview) -> None:
        sink(self, k, chunk, data)
        late.poison([data])

    monkeypatch.setattr(rank_worker.RankWorker, "_write", spoil)


@pytest.mark.parametrize("order", [*late.ORDERS, *SEEDS])
def test_same_bytes_in_any_order(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any, order: str | int
) -> None:
    poisoning(monkeypatch)
    device = late.Late(order)
    report = merged(monkeypatch, pair, tmp_path / "ring", (engine(device),))
    assert contents(tmp_path / "ring") == plain[0]
    assert device.waited == {"compute", "down", "host"}
    assert sum(report.shares.values()) == report.bytes_written
    for ours, theirs in zip(report.outputs, plain[1].outputs, strict=True):
        assert (ours.changed, ours.non_finite) == (theirs.changed, theirs.non_finite)
        assert ours.relative_change == pytest.approx(theirs.relative_change, rel=1e-5)
    assert report.relative_distance == pytest.approx(plain[1].relative_distance, rel=1e-5)
    assert report.max_abs_difference == plain[1].max_abs_difference


@pytest.mark.parametrize("order", [*late.ORDERS, 0, 1])
def test_two_slots_are_enough(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any, order: str | int
) -> None:
    """With many workers a lane has two slots."""
    monkeypatch.setattr("expo.execution.lanes.MOST_RING_SLOTS", 2)
    poisoning(monkeypatch)
    merged(monkeypatch, pair, tmp_path / "ring", (engine(late.Late(order)),))
    assert contents(tmp_path / "ring") == plain[0]


@pytest.mark.parametrize("lost", ["compute", "down", "host"])
def test_every_wait_is_needed(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any, lost: str
) -> None:
    """If any one of the three waits is left out, some allowed order gives other bytes."""
    poisoning(monkeypatch)
    wrong = []
    for order in (*late.ORDERS, *SEEDS):
        merged(monkeypatch, pair, tmp_path / str(order), (engine(late.Late(order, lost)),))
        if contents(tmp_path / str(order)) != plain[0]:
            wrong.append(order)
    assert wrong


def test_verify_computes_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any
) -> None:
    device = late.Late()
    report = merged(monkeypatch, pair, tmp_path / "ring", (engine(device),), verify=True)
    assert report.verified
    assert contents(tmp_path / "ring") == plain[0]
    assert device.asked == len(late.STREAMS), "a lane on the GPU computed the output again"


def test_gpu_and_cpu_on_one_queue(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any
) -> None:
    crew = (engine(late.Late(1)), engine(late.Late(2)), choose())
    report = merged(monkeypatch, pair, tmp_path / "ring", crew)
    assert contents(tmp_path / "ring") == plain[0]
    assert sum(report.shares.values()) == report.bytes_written
    assert report.shares["triton"]


def test_shares_count_the_cpu_in_a_worker_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CPU copies, and computes small pieces and F64 tensors; its bytes do not count as the GPU's."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 1 << 20)  # one chunk has all tensors
    shapes = {"k": ("BF16", (64, 64)), "double": ("F64", (30, 31)), "kept": ("BF16", (90, 90)), "q": ("BF16", (64,))}
    pair = [write_folder(tmp_path / name, random_tensors(shapes, i)) for i, name in enumerate(("sft", "aligned"))]
    report = merged(monkeypatch, (pair[0], pair[1]), tmp_path / "ring", (engine(late.Late()),))
    copied = 2 * 64 * 64  # bytes of "k" in the output whose alpha is 0
    by_cpu = copied + len(ALPHAS) * (8 * 30 * 31 + 2 * 90 * 90 + 2 * 64)
    assert report.shares == {"triton": report.bytes_written - by_cpu, choose().name: by_cpu}


def test_memory_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allocated = []
    for rows in (100, 3000):
        shapes = {"weight": ("BF16", (rows, 256))}
        pair = [write_folder(tmp_path / f"{name}{rows}", random_tensors(shapes, i)) for i, name in enumerate("sa")]
        device = late.Late()
        monkeypatch.setattr(job, "engines_for", lambda *_, device=device: (engine(device),))
        expo.merge(*pair, 0.3, tmp_path / f"out{rows}")
        allocated.append(device.allocated)
    assert allocated[0] == allocated[1] < 3 * 2 * 4 * (16 << 10)


def outs(folder: Path) -> list[Path]:
    return [folder / f"{alpha:g}" for alpha in ALPHAS]


def left_to_resume(said: str, folder: Path) -> bool:
    """Assert that a failed merge left nothing but its staging folders, and return True if its message says so."""
    assert sorted(folder.iterdir()) == sorted(map(staging_folder, outs(folder)))
    return said.endswith(f"; {kept(*outs(folder))}")


@pytest.mark.parametrize("order", ["needed", "at once", 3])
def test_a_kernel_that_fails(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any, order: str | int
) -> None:
    """The error names the engine, finished chunks are kept for --resume, and no operation is pending any more."""
    calls = iter(range(1000))

    def failing(*arguments: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        late.kernel(*arguments)

    monkeypatch.setattr(sweep, "launch", failing)
    device = late.Late(order)
    with pytest.raises(expo.EngineError, match=r"^`engine='triton'` failed: CUDA error: an illegal memory") as caught:
        merged(monkeypatch, pair, tmp_path / "ring", (engine(device),))
    assert not any(device.queues.values())
    assert left_to_resume(str(caught.value), tmp_path / "ring")
    monkeypatch.setattr(sweep, "launch", late.kernel)
    report = merged(monkeypatch, pair, tmp_path / "ring", (engine(late.Late(order)),), resume=True)
    assert contents(tmp_path / "ring") == plain[0]
    assert 0 < report.resumed == report.bytes_written - sum(report.shares.values())
    for ours, theirs in zip(report.outputs, plain[1].outputs, strict=True):
        assert (ours.changed, ours.non_finite) == (theirs.changed, theirs.non_finite)


def test_a_gpu_without_memory(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any
) -> None:
    class Full(late.Late):
        def memory(self, size: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 MiB")

    with pytest.raises(expo.EngineError, match=r"^`engine='triton'` failed: CUDA out of memory") as caught:
        merged(monkeypatch, pair, tmp_path / "ring", (engine(Full()),))
    assert left_to_resume(str(caught.value), tmp_path / "ring")
    merged(monkeypatch, pair, tmp_path / "ring", (choose(),), resume=True)  # the user may resume on the CPU
    assert contents(tmp_path / "ring") == plain[0]


def test_cancel_waits_for_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path], tmp_path: Path, plain: Any
) -> None:
    stop, device = threading.Event(), late.Late("needed")

    def launch(*arguments: Any) -> None:
        stop.set()
        late.kernel(*arguments)

    monkeypatch.setattr(sweep, "launch", launch)
    with pytest.raises(expo.Cancelled) as caught:
        merged(monkeypatch, pair, tmp_path / "ring", (engine(device),), cancel=stop)
    assert not any(device.queues.values())
    assert left_to_resume(str(caught.value), tmp_path / "ring")
    merged(monkeypatch, pair, tmp_path / "ring", (engine(late.Late()), choose()), resume=True)
    assert contents(tmp_path / "ring") == plain[0]
