"""`make gpu` as a whole, at tiny sizes, on a GPU in software that every process of the command finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the PTX of an older Triton has what helpers.ptx does not know")

from bench import gpu_probe, gpu_report

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
TINY = {
    "EXPO_BENCH_GPU_ELEMENTS": "60000",
    "EXPO_PROBE_ROUNDS": "1",
    "EXPO_PROBE_MB": "0.05",
    "EXPO_PROBE_PAIR_MB": "0.5",
    "EXPO_PROBE_MODELS": "1e4 1e18",
    # pytest takes these words in each stage: one test, and two contestants
    "PYTEST_ADDOPTS": "-k 'pass_their or bench_gpu and (copy-BF16 or plain-BF16)'",
    "SOFTWARE_GPUS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (HELPERS / "software_site", HELPERS))),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON that the command writes."""
    out = tmp_path_factory.mktemp("gpu")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", str(out)],
        cwd=ROOT, env=own | TINY, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| bus | up |" in done.stdout
    return out / "gpu.json"


@pytest.mark.exhaustive
def test_every_stage_and_every_part_gives_figures(report: Path) -> None:
    results: dict[str, Any] = json.loads(report.read_text())
    assert results["device"] == "a GPU in software"
    assert (results["tests"]["passed"], results["tests"]["failed"]) == (1, 0)
    assert results["benchmarks"]["benchmarks"].keys() == {"test_gpu[copy-BF16]", "test_gpu[plain-BF16]"}
    parts = results["probe"]["parts"]
    assert [*parts] == [part.__name__.replace("_", " ") for part in gpu_probe.PARTS]
    assert [name for name, figures in parts.items() if "error" in figures or len(figures) < 2] == []
    assert parts["models"]["1e+18 weights"].startswith("left out")
    assert parts["illegal access"]["exit code"] == 1
    assert "0x1000" in parts["illegal access"]["message"]  # the address 4096
    assert len(parts["merges"]) == 2 * 2 * 4 + 1


@pytest.mark.exhaustive
def test_the_report_takes_figures_of_gpus_alone(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    page = tmp_path / "docs" / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    before = page.read_text()
    assert gpu_report.main([str(report), str(tmp_path)]) == 1
    assert "a GPU in software gave these figures, and no GPU" in capsys.readouterr().err
    assert page.read_text() == before

    results = json.loads(report.read_text()) | {"device": "NVIDIA H100 80GB (a test's)"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(results))
    for _ in range(2):  # the second report takes the place of the first
        assert gpu_report.main([str(other), str(tmp_path)]) == 0
        text = page.read_text()
        assert text.count("NVIDIA H100 80GB (a test's), driver") == text.count(gpu_report.BEGIN) == 1
        assert text.startswith(before.partition(gpu_report.BEGIN)[0])
        assert text.endswith(before.partition(gpu_report.END)[2])
    assert "No figures yet" not in text
    saved = tmp_path / "bench" / "results" / "gpu-nvidia-h100-80gb-a-test-s.json"
    assert json.loads(saved.read_text())["device"] == results["device"]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process takes the parts that follow, because a GPU may not answer the first one any more."""
    started: list[list[str]] = []

    def broken(folders: dict[str, Path]) -> gpu_probe.Figures:
        raise RuntimeError("an illegal memory access")

    def bus(folders: dict[str, Path]) -> gpu_probe.Figures:
        return {"up": 1.0}

    monkeypatch.setattr(gpu_probe, "PARTS", (broken, bus))
    monkeypatch.setattr(gpu_probe.subprocess, "run", lambda words, **_: started.append(words))
    file = tmp_path / "probe.json"
    assert gpu_probe.main([str(file)]) == 1
    assert started == [[sys.executable, "-m", "bench.gpu_probe", str(file), "bus"]]
    assert json.loads(file.read_text())["broken"]["error"] == "RuntimeError: an illegal memory access"
    assert gpu_probe.main([str(file), "bus"]) == 1  # the error of the first part counts
    assert json.loads(file.read_text())["bus"]["up"] == 1.0
    monkeypatch.setattr(gpu_probe, "UNTIL", 0.0)
    assert gpu_probe.run_part(bus, {}) == {"left out": "no time was left"}
