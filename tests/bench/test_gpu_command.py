"""`make gpu` without a GPU, its report from invented figures, and its time limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expo.kernels.contract import Operand, Term

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this platform")

import torch

from bench import bench_gpu, gpu

ROOT = Path(__file__).parents[2]
HIDDEN = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")  # the machine may have GPUs
JUNIT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/><testcase name="c"><skipped message="x"/></testcase>
<testcase name="d[BF16]"><failure message="AssertionError: 3 differ"/></testcase>
<testcase name="e"><error>torch is gone</error></testcase>
</testsuite></testsuites>"""
RATE = {"gb_per_s": 1111.0, "of_roof": 0.5, "device": "GPU of a test", "driver": "1.2", "torch": "3.4", "triton": "5.6"}
STATS = {"median": 1.0, "iqr": 0.0, "min": 1.0, "max": 1.0, "rounds": 1, "data": [1.0]}
RAW = {
    "machine_info": {"cpu": "a test's"},
    "datetime": "2026-01-02T03:04:05",
    "commit_info": {"id": "abc", "dirty": False},
    "benchmarks": [
        {"name": f"test_gpu[plain-{dtype}]", "stats": STATS, "extra_info": RATE} for dtype in ("BF16", "F32")
    ],
}

MAKES = (
    "MAKELEVEL",
    "MAKEFLAGS",
    "MFLAGS",
)  # variables with which one make starts another one, as `make test` would here


def test_without_a_gpu_one_line_is_printed_before_anything_is_built(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    own = {name: value for name, value in os.environ.items() if name not in MAKES}
    done = subprocess.run(command, cwd=ROOT, env=own | HIDDEN, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first == "make gpu needs a GPU and the packages of the tests: torch sees no CUDA device"
    assert [line for line in rest if not line.startswith("make: ***")] == []
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """Return the list of all commands; in place of a command, the reports above are written."""
    commands: list[tuple[list[str], float]] = []

    def run(arguments: list[str], seconds: float, **_: str) -> tuple[int, float]:
        commands.append((arguments, seconds))
        for argument in arguments:
            name, _, path = argument.partition("=")
            if name in ("--junitxml", "--benchmark-json"):
                Path(path).write_text(JUNIT if name == "--junitxml" else json.dumps(RAW))
        return (1 if "tests/execution/test_gpu.py" in arguments else 0), 2.0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "find_obstacle", lambda: "")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "GPU of a test")
    return commands


@pytest.mark.usefixtures("own_signals")
def test_report(recorded: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes one JSON and prints tables, and fails if a test fails."""
    assert gpu.main([str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["device"] == "GPU of a test"
    assert results["versions"].keys() == {"python", "torch", "triton"}
    counted = {
        **{"passed": 2, "failed": 2, "skipped": 1, "skips": {"c": "x"}, "seconds": 2.0},
        "failures": {"d[BF16]": "AssertionError: 3 differ", "e": "torch is gone"},
    }
    assert results["tests"] == {**counted, "exit_code": 1}
    assert results["benchmarks"]["runs"] == {**counted, "exit_code": 0}
    assert results["benchmarks"]["benchmarks"]["test_gpu[plain-F32]"]["gb_per_s"] == 1111.0
    assert "| tests | 2 | 2 | 1 | 2.0 |\n| benchmarks | 2 | 2 | 1 | 2.0 |\n" in printed
    assert "failed: d[BF16]: AssertionError: 3 differ\nfailed: e: torch is gone\n" in printed
    assert "the tests ended with exit code 1\n" in printed
    assert "not measured: c: x\n" in printed
    assert "| plain | 1111.0 (0.50) | not run | 1111.0 (0.50) |" in printed


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("imports", [0.0, 100.0])
def test_all_of_it_takes_nine_minutes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: float) -> None:
    """The limit holds if every stage takes all its time and is interrupted, and if imports take time."""
    now, commands = [0.0], []

    class Clock:
        time = monotonic = staticmethod(lambda: now[0])

    def run(arguments: list[str], seconds: float, **environment: str) -> tuple[None, float]:
        commands.append(arguments)
        now[0] += seconds + gpu.GRACE_SECONDS
        if "EXPO_BENCH_GPU_UNTIL" in environment:
            last = gpu.PART_SECONDS if "bench.gpu_probe" in arguments else gpu.CONTESTANT_SECONDS
            assert float(environment["EXPO_BENCH_GPU_UNTIL"]) == now[0] - gpu.GRACE_SECONDS - last
        return None, seconds

    def obstacle() -> str:
        now[0] += imports
        return ""

    monkeypatch.setattr(gpu, "time", Clock)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "find_obstacle", obstacle)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "GPU of a test")
    assert gpu.main([str(tmp_path)]) == 1
    assert [arguments[0] for arguments in commands] == ["setup.py", "-m", "-m", "-m"]
    assert gpu.TOTAL_SECONDS - 1 <= now[0] <= 9 * 60 - 10
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert "FileNotFoundError" in results["benchmarks"]["unreadable"]
    assert "FileNotFoundError" in results["probe"]["parts"]["probe"]["error"]


def test_the_tests_that_need_a_gpu_are_in_the_files_that_are_run() -> None:
    """`make gpu` collects no other files, because the machine with the GPU may lack the packages of other tests."""
    marked = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    files = {str(path.relative_to(ROOT)) for path in marked if re.search(r"\bmark\.gpu\b", path.read_text())}
    assert files == {"tests/execution/test_gpu.py", "bench/bench_gpu.py"}


@pytest.mark.usefixtures("own_signals")
def test_the_tests_results_are_kept_before_the_benchmarks_begin(
    recorded: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "read_figures", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.main([str(tmp_path)])
    assert json.loads((tmp_path / "gpu.json").read_text())["tests"]["passed"] == 2


@pytest.mark.parametrize(
    ("stages", "good"),
    [
        ({}, True),
        ({"tests": {"exit_code": 1}}, False),
        ({"tests": {"exit_code": None}}, False),
        ({"tests": {"passed": 0}}, False),
        ({"benchmarks": {"exit_code": 1}}, False),
        ({"benchmarks": {"passed": 0}}, False),
        ({"benchmarks": {"skipped": 1}}, False),
        ({"probe": {"exit_code": 1}}, False),
        ({"probe": {"exit_code": None}}, False),
    ],
)
def test_success(stages: dict[str, dict[str, Any]], good: bool) -> None:
    well = {"exit_code": 0, "passed": 5, "skipped": 0}
    tests, runs, probe = (well | stages.get(name, {}) for name in ("tests", "benchmarks", "probe"))
    assert gpu.has_succeeded({"tests": tests, "benchmarks": {"runs": runs}, "probe": probe}) is good


@pytest.mark.parametrize("compiler", [None, "gcc"])
def test_a_c_compiler_is_needed(monkeypatch: pytest.MonkeyPatch, compiler: str | None) -> None:
    """Triton compiles its launcher, so without a compiler every kernel fails."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "PACKAGES", ("torch",))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: compiler if name == compiler else None)
    assert ("install cc or gcc or clang" in gpu.find_obstacle()) is (compiler is None)
    monkeypatch.setenv("CC", "/opt/cc")
    assert gpu.find_obstacle() == ""


def test_a_stage_that_takes_too_long_is_interrupted_and_reports(tmp_path: Path) -> None:
    """The script writes its report at an interrupt, as pytest does."""
    script = "import time, sys\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open(sys.argv[1], 'w').close()"
    start = time.monotonic()
    code, seconds = gpu.run(["-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + script,
                             str(tmp_path / "report")], 1.5)  # fmt: skip
    assert code is None
    assert seconds <= time.monotonic() - start < 30
    assert (tmp_path / "report").exists()


@pytest.mark.parametrize("text", [None, "", JUNIT[:90], json.dumps(RAW)[:90], "{}"])
def test_reports_that_are_missing_or_cut_short(tmp_path: Path, text: str | None) -> None:
    """A run that crashed or was killed leaves such reports."""
    report = tmp_path / "report"
    if text is not None:
        report.write_text(text)
    read = gpu.read_results(report)
    results = {
        "device": "x", "driver": "x", "versions": {}, "tests": {**read, "exit_code": None, "seconds": 1.0},
        "benchmarks": {**gpu.read_figures(report), "runs": {**read, "exit_code": -11, "seconds": 1.0}},
        "probe": {"exit_code": None, "parts": gpu.read_parts(tmp_path / "none")},
    }  # fmt: skip
    printed = "\n".join(gpu.make_lines(results))
    assert "the tests were stopped because their time was over" in printed
    assert "the report of the tests cannot be read: " in printed
    assert "the benchmarks ended with exit code -11" in printed
    assert "there are no figures: " in printed
    assert "| probe | error | FileNotFoundError: " in printed
    assert "the probe was stopped because its time was over" in printed


def test_benchmarks_without_rounds_or_figures_do_not_lose_the_others(tmp_path: Path) -> None:
    report = tmp_path / "report"
    bare = [
        {"name": "test_gpu[sweep_of_4-BF16]", "stats": {**STATS, "rounds": 0}, "extra_info": {}},
        {"name": "test_gpu[whole-BF16]", "extra_info": {}},
        {"name": "test_gpu[lerp-BF16]", "stats": STATS},
    ]
    report.write_text(json.dumps({**RAW, "benchmarks": [*bare, *RAW["benchmarks"]]}))
    figures = gpu.read_figures(report)
    assert figures["missing"] == ["test_gpu[sweep_of_4-BF16]", "test_gpu[whole-BF16]"]
    printed = "\n".join(gpu.make_tables(figures))
    assert "not measured: test_gpu[sweep_of_4-BF16]\nnot measured: test_gpu[whole-BF16]\n" in printed
    assert "| lerp | not run | not run | not run |" in printed
    assert "| plain | 1111.0 (0.50) | not run | 1111.0 (0.50) |" in printed


# A benchmark without a GPU: the tensors are on the CPU, and the timing is replaced.


class Benchmark:
    """The part of the fixture that a contestant uses; it may be interrupted."""

    has_error, group = False, ""

    def __init__(self, interrupted: bool = False) -> None:
        self.extra_info: dict[str, Any] = {}
        self.interrupted, self.timed = interrupted, False
        self.stats = self

    def pedantic(self, *_: Any, args: tuple[Any, Any, list[float]], **__: Any) -> None:
        self.timed = True
        if self.interrupted:
            raise KeyboardInterrupt
        args[2].append(1.0)
        self.data = [1.0]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_inputs(_: str) -> list[Any]:
        sft, aligned = torch.randn(2, 64).bfloat16()
        return [bench_gpu.Tensors(sft, aligned, aligned.new_zeros(bench_gpu.K, 64), [64])]

    def launch(anchor: Operand, terms: Sequence[Term], outputs: Sequence[torch.Tensor]) -> None:
        (alpha,), _, sft = terms[0]
        aligned = anchor.memory.float()
        outputs[0].copy_((aligned + alpha * (aligned - sft.memory.float())).bfloat16())

    monkeypatch.setattr(bench_gpu, "make_inputs", make_inputs)
    monkeypatch.setattr(bench_gpu.extrapolate, "launch", launch)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "GPU of a test")


@pytest.mark.usefixtures("on_the_cpu")
def test_a_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = Benchmark()
    bench_gpu.test_gpu(benchmark, bench_gpu.plain, "BF16")
    assert benchmark.extra_info["of_roof"] == 1.5
    monkeypatch.setattr(bench_gpu, "DEADLINE", time.time() - 1)
    with pytest.raises(pytest.skip.Exception, match="no time was left"):
        bench_gpu.test_gpu(Benchmark(), bench_gpu.plain, "BF16")


@pytest.mark.usefixtures("on_the_cpu")
def test_wrong_bits_have_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu.extrapolate, "launch", lambda *_: None)
    benchmark = Benchmark()
    with pytest.raises(AssertionError):
        bench_gpu.test_gpu(benchmark, bench_gpu.plain, "BF16")
    assert (benchmark.timed, benchmark.extra_info) == (False, {})


@pytest.mark.usefixtures("on_the_cpu")
def test_an_interrupted_contestant_is_left_out() -> None:
    """pytest-benchmark cannot summarise a benchmark without rounds, and would write no JSON at all."""
    benchmark = Benchmark(interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.test_gpu(benchmark, bench_gpu.plain, "BF16")
    assert benchmark.has_error
