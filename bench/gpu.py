"""This runs all that needs a GPU, in at most 9 minutes: python -m bench.gpu [FOLDER] (`make gpu`).

It builds the extension in place, runs the tests that are marked `gpu` and then `bench_gpu.py`. It writes
FOLDER/gpu.json after each stage, and prints tables. Nothing is installed or downloaded: a C compiler and the packages
of NEEDED must be there. A package that is missing where no registry can be reached comes along as a wheel:
`pip download --no-deps -d wheels NAME` elsewhere, `pip install --no-index --no-deps wheels/*.whl` there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.report import keep, tables

ROOT = Path(__file__).parents[1]
NEEDED = (
    *("torch", "triton", "setuptools", "numpy", "ml_dtypes", "safetensors", "transformers", "huggingface_hub", "yaml"),
    *("pytest", "pytest_benchmark"),
)
COMPILERS = ("cc", "gcc", "clang")
# Seconds: of all of it, imports too; of a stage at most; of the last contestant that begins; after an interrupt.
ALL, BUILD, TESTS, LAST, GRACE = 525, 45, 270, 40, 15
ELEMENTS = 64 << 20  # of a tensor that is benchmarked, in bf16: most of the time goes into checking its result
MESSAGE = 300  # characters that are kept of a failure
# A warning is an error in the project's tests, where versions are pinned; here only the one that kernels are given up.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-W", "error::RuntimeWarning", "-m", "gpu")


def obstacle() -> str:
    """Return why nothing can be run here, or ""."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    if missing:
        return f"these packages are missing: {', '.join(missing)}; see the head of bench/gpu.py"
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        return f"Triton compiles its launcher with a C compiler: install {' or '.join(COMPILERS)}, or name one in CC"
    return ""


def run(arguments: Sequence[str], seconds: float, **environment: str) -> tuple[int | None, float]:
    """Run Python in the checkout; return its exit code and its seconds, None for one that was stopped.

    It is interrupted when its time is over, as pytest then still writes its reports.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment)
    code: int | None = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code, time.monotonic() - start


def results(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, and why, from JUnit's XML, which may be cut short."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "skips": {}}
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {**found, "unreadable": str(error)[:MESSAGE]}
    for case in cases:
        bad = [each for kind in ("failure", "error") if (each := case.find(kind)) is not None]
        skip = case.find("skipped")
        if bad:
            found["failures"][case.get("name", "")] = (bad[0].get("message") or bad[0].text or "")[:MESSAGE]
        elif skip is not None:
            found["skips"][case.get("name", "")] = (skip.get("message") or "")[:MESSAGE]
        else:
            found["passed"] += 1
    return {**found, "failed": len(found["failures"]), "skipped": len(found["skips"])}


def figures(report: Path) -> dict[str, Any]:
    """Return what is kept of pytest-benchmark's JSON, which may be missing or cut short."""
    try:
        return keep(json.loads(report.read_text()))
    except (OSError, ValueError, KeyError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"[:MESSAGE]}


def measure(folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Test and benchmark; yield all that is to be kept, after each stage. deadline: of time.monotonic()."""
    import torch
    import triton

    from bench.bench_gpu import driver

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
    xml = folder / "tests.xml"
    code, seconds = run([*PYTEST, "tests/execution/test_gpu.py", f"--junitxml={xml}"], left(deadline, TESTS))
    found["tests"] = {**results(xml), "exit_code": code, "seconds": round(seconds, 1)}
    yield found
    raw, xml = folder / "benchmarks.json", folder / "benchmarks.xml"
    more = ["bench/bench_gpu.py", "--benchmark-only", f"--benchmark-json={raw}", f"--junitxml={xml}"]
    limit = left(deadline)
    until = time.time() + limit - LAST
    chosen = {"EXPO_BENCH_GPU_ELEMENTS": str(ELEMENTS), "EXPO_BENCH_GPU_UNTIL": str(until)}
    code, seconds = run([*PYTEST, *more], limit, **chosen)
    runs = {**results(xml), "exit_code": code, "seconds": round(seconds, 1)}
    found["benchmarks"] = {**figures(raw), "runs": runs}
    yield found


def left(deadline: float, most: float = ALL) -> float:
    """Return the seconds that a stage may take, so that its end and an interrupt of it are before the deadline."""
    return max(1.0, min(most, deadline - time.monotonic() - GRACE))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is printed: the GPU, the tests, and a table of the benchmarks."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"{found['device']}, driver {found['driver']}, {versions}"
    yield "\n| run | passed | failed | skipped | s |\n|---|---|---|---|---|"
    stages = {"tests": found["tests"], "benchmarks": found["benchmarks"]["runs"]}
    for name, stage in stages.items():
        yield f"| {name} | {stage['passed']} | {stage['failed']} | {stage['skipped']} | {stage['seconds']} |"
    for name, stage in stages.items():
        yield from (f"failed: {each}: {text}" for each, text in list(stage["failures"].items())[:20])
        if stage["exit_code"] is None:
            yield f"the {name} were stopped for want of time: not all were run"
        elif stage["exit_code"] != 0:
            yield f"the {name} ended with exit code {stage['exit_code']}"
        if "unreadable" in stage:
            yield f"the report of the {name} cannot be read: {stage['unreadable']}"
    yield from (f"not measured: {each}: {text}" for each, text in stages["benchmarks"]["skips"].items())
    if "benchmarks" in found["benchmarks"]:
        yield from tables(found["benchmarks"])
    else:
        yield f"there are no figures: {found['benchmarks']['unreadable']}"


def succeeded(found: dict[str, Any]) -> bool:
    """Return whether tests ran and all passed, and all benchmarks were measured."""
    tests, runs = found["tests"], found["benchmarks"]["runs"]
    good = tests["exit_code"] == 0 and tests["passed"] and runs["exit_code"] == 0 and runs["passed"]
    return bool(good and not runs["skipped"])


def main(arguments: Sequence[str]) -> int:
    """Return 0, or 1 where something failed or there is no GPU."""
    deadline = time.monotonic() + ALL
    why = obstacle()
    if why:
        print(f"make gpu needs a GPU and what the tests need: {why}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children would inherit that it is ignored
    out = Path(arguments[0] if arguments else "build")
    out.mkdir(parents=True, exist_ok=True)
    code, _ = run(["setup.py", "-q", "build_ext", "--inplace"], left(deadline, BUILD))
    if not any((ROOT / "kernels").glob("_cpu*.so")):  # setup.py does without it where there is no compiler
        print(f"the extension was not built (exit code {code}); NumPy takes its place", file=sys.stderr)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(Path(folder), deadline):
            (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(found)))
    print(f"\n{out / 'gpu.json'}")
    return 0 if succeeded(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
