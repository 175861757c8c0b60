"""`make gpu` where there is no GPU, and its report, of figures made up here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench import gpu

ROOT = Path(__file__).parents[1]
HIDDEN = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")  # the GPUs that there may be
JUNIT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/><testcase name="c"><skipped message="x"/></testcase>
<testcase name="d[BF16]"><failure message="x"/></testcase><testcase name="e"><error message="x"/></testcase>
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


def test_without_a_gpu_one_line_says_so_before_anything_is_built(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | HIDDEN, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first == "make gpu needs a GPU and what the tests need: torch sees no CUDA device"
    assert [line for line in rest if not line.startswith("make: ***")] == []
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """What is run, in place of which reports are put down that a test wrote."""
    commands: list[tuple[list[str], float]] = []

    def run(arguments: list[str], seconds: float, **_: str) -> tuple[int, float]:
        commands.append((arguments, seconds))
        for argument in arguments:
            name, _, path = argument.partition("=")
            if name in ("--junitxml", "--benchmark-json"):
                Path(path).write_text(JUNIT if name == "--junitxml" else json.dumps(RAW))
        return (1 if "tests" in arguments else 0), 2.0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "GPU of a test")
    return commands


@pytest.mark.usefixtures("own_signals")
def test_report(recorded: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON and the tables; tests that failed fail the command."""
    assert gpu.main([str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["device"] == "GPU of a test"
    assert found["versions"].keys() == {"python", "torch", "triton"}
    assert found["tests"] == {
        **{"passed": 2, "failed": 2, "skipped": 1, "names_of_failed": ["d[BF16]", "e"]},
        **{"exit_code": 1, "seconds": 2.0},
    }
    assert found["benchmarks"]["benchmarks"]["test_gpu[plain-F32]"]["gb_per_s"] == 1111.0
    assert "| `pytest -m gpu` | 2 | 2 | 1 | 2.0 |\nfailed: d[BF16]\nfailed: e" in printed
    assert "| plain | 1111.0 (0.50) | not run | 1111.0 (0.50) |" in printed


@pytest.mark.usefixtures("own_signals")
def test_all_of_it_takes_nine_minutes_at_most(recorded: list[Any], tmp_path: Path) -> None:
    gpu.main([str(tmp_path)])
    assert [arguments[0] for arguments, _ in recorded] == ["setup.py", "-m", "-m"]
    assert sum(seconds + gpu.GRACE for _, seconds in recorded) <= 9 * 60


@pytest.mark.parametrize(
    ("tests", "benchmarks", "good"),
    [((0, 5), 0, True), ((1, 5), 0, False), ((None, 5), 0, False), ((0, 0), 0, False), ((0, 5), 1, False)],
)
def test_success(tests: tuple[int | None, int], benchmarks: int, good: bool) -> None:
    found = {"tests": {"exit_code": tests[0], "passed": tests[1]}, "benchmarks": {"exit_code": benchmarks}}
    assert gpu.succeeded(found) is good


def test_what_takes_too_long_is_interrupted_and_reports(tmp_path: Path) -> None:
    """As pytest does: at an interrupt it still writes what it has."""
    script = "import time, sys\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open(sys.argv[1], 'w').close()"
    start = time.monotonic()
    code, seconds = gpu.run(["-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + script,
                             str(tmp_path / "report")], 1.5)  # fmt: skip
    assert code is None
    assert seconds <= time.monotonic() - start < 30
    assert (tmp_path / "report").exists()


def test_reports_that_are_missing() -> None:
    """A run that crashed leaves none."""
    found = {
        "device": "x", "driver": "x", "versions": {}, "tests": {**gpu.counts(Path("nowhere")), "exit_code": None,
        "seconds": 1.0}, "benchmarks": {"exit_code": -11, "seconds": 1.0},
    }  # fmt: skip
    said = "\n".join(gpu.lines(found))
    assert "stopped for want of time" in said
    assert "the benchmarks ended with -11" in said
