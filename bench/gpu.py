"""Run everything that needs a GPU, in at most 9 minutes: python -m bench.gpu [FOLDER] (`make gpu`).

The command builds the extension in place, runs the tests that are marked `gpu`, then `bench_gpu.py`, and then
`gpu_probe.py`. It writes
FOLDER/gpu.json after each stage, and prints tables. It installs and downloads nothing, so a C compiler and the packages
of PACKAGES must be installed. On a machine that reaches no registry, a missing package can be installed from a wheel:
`pip download --no-deps -d wheels NAME` on another machine, `pip install --no-index --no-deps wheels/*.whl` on this one.
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

from bench.report import extract_figures, make_tables

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("torch", "triton", "setuptools", "numpy", "ml_dtypes", "safetensors", "transformers", "huggingface_hub", "yaml"),
    *("pytest", "pytest_benchmark"),
)
COMPILERS = ("cc", "gcc", "clang")
TOTAL_SECONDS = 525  # the most seconds of the whole command, imports included
BUILD_SECONDS = 45
TEST_SECONDS = 270
PART_SECONDS = 25  # no part of the probe starts with less time left
CONTESTANT_SECONDS = 40  # no contestant starts with less time left
GRACE_SECONDS = 15  # the time from the interrupt of a stage to its end
PROBE_SECONDS = 150
# The elements of the benchmarked model in bf16; the check of the results takes most of the time.
ELEMENTS = int(os.environ.get("EXPO_BENCH_GPU_ELEMENTS", 64 << 20))
MESSAGE_CHARACTERS = 300  # the characters of a failure's message that are kept
MOST_FAILURES = 20  # the failures of a stage that are printed
# The project's tests treat every warning as an error, with pinned versions. Here the versions may be others, so only
# the warning that a kernel is not used is an error.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-W", "error::RuntimeWarning", "-m", "gpu")


def find_obstacle() -> str:
    """Return the reason why this machine cannot run the command, or ""."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
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
    """Run Python in the checkout; return its exit code, None if it was stopped, and its seconds.

    Python is interrupted when its time is over; pytest still writes its reports then.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment)
    code: int | None = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code, time.monotonic() - start


def read_results(report: Path) -> dict[str, Any]:
    """Return the numbers of tests that passed, failed and were skipped, with reasons.

    The numbers come from JUnit's XML, which may be missing or cut short.
    """
    results: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "skips": {}}
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {**results, "unreadable": str(error)[:MESSAGE_CHARACTERS]}
    for case in cases:
        failures = [each for kind in ("failure", "error") if (each := case.find(kind)) is not None]
        skip = case.find("skipped")
        if failures:
            message = failures[0].get("message") or failures[0].text or ""
            results["failures"][case.get("name", "")] = message[:MESSAGE_CHARACTERS]
        elif skip is not None:
            results["skips"][case.get("name", "")] = (skip.get("message") or "")[:MESSAGE_CHARACTERS]
        else:
            results["passed"] += 1
    return {**results, "failed": len(results["failures"]), "skipped": len(results["skips"])}


def read_figures(report: Path) -> dict[str, Any]:
    """Return the figures of pytest-benchmark's JSON, which may be missing or cut short."""
    try:
        return extract_figures(json.loads(report.read_text()))
    except (OSError, ValueError, KeyError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS]}


def read_parts(report: Path) -> dict[str, Any]:
    """Return the figures of each part of the probe; the JSON may be missing."""
    try:
        parts: dict[str, Any] = json.loads(report.read_text())
    except (OSError, ValueError) as error:
        return {"probe": {"error": f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS]}}
    return parts


def measure(folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Run the tests and the benchmarks, and yield all results after each stage; the deadline is in time.monotonic()."""
    import torch
    import triton

    from bench.bench_gpu import driver_version

    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
    xml = folder / "tests.xml"
    tests = ["tests/execution/test_gpu.py", f"--junitxml={xml}"]
    code, seconds = run([*PYTEST, *tests], time_left(deadline, TEST_SECONDS))
    results["tests"] = {**read_results(xml), "exit_code": code, "seconds": round(seconds, 1)}
    yield results
    raw, xml = folder / "benchmarks.json", folder / "benchmarks.xml"
    benchmarks = ["bench/bench_gpu.py", "--benchmark-only", f"--benchmark-json={raw}", f"--junitxml={xml}"]
    limit = time_left(deadline - PROBE_SECONDS)
    until = time.time() + limit - CONTESTANT_SECONDS
    environment = {"EXPO_BENCH_GPU_ELEMENTS": str(ELEMENTS), "EXPO_BENCH_GPU_UNTIL": str(until)}
    code, seconds = run([*PYTEST, *benchmarks], limit, **environment)
    runs = {**read_results(xml), "exit_code": code, "seconds": round(seconds, 1)}
    results["benchmarks"] = {**read_figures(raw), "runs": runs}
    yield results
    report, limit = folder / "probe.json", time_left(deadline)
    until = time.time() + limit - PART_SECONDS
    code, seconds = run(["-m", "bench.gpu_probe", str(report)], limit, EXPO_BENCH_GPU_UNTIL=str(until))
    results["probe"] = {"exit_code": code, "seconds": round(seconds, 1), "parts": read_parts(report)}
    yield results


def time_left(deadline: float, most: float = TOTAL_SECONDS) -> float:
    """Return the seconds that a stage may take if it must end before the deadline, even after an interrupt."""
    return max(1.0, min(most, deadline - time.monotonic() - GRACE_SECONDS))


def make_lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the report: the GPU, the tests, and the tables of the benchmarks."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"{results['device']}, driver {results['driver']}, {versions}"
    yield "\n| run | passed | failed | skipped | s |\n|---|---|---|---|---|"
    stages = {"tests": results["tests"], "benchmarks": results["benchmarks"]["runs"]}
    for name, stage in stages.items():
        yield f"| {name} | {stage['passed']} | {stage['failed']} | {stage['skipped']} | {stage['seconds']} |"
    for name, stage in stages.items():
        yield from (f"failed: {each}: {text}" for each, text in list(stage["failures"].items())[:MOST_FAILURES])
        if stage["exit_code"] is None:
            yield f"the {name} were stopped because their time was over: not all of them ran"
        elif stage["exit_code"] != 0:
            yield f"the {name} ended with exit code {stage['exit_code']}"
        if "unreadable" in stage:
            yield f"the report of the {name} cannot be read: {stage['unreadable']}"
    yield from (f"not measured: {each}: {text}" for each, text in stages["benchmarks"]["skips"].items())
    if "benchmarks" in results["benchmarks"]:
        yield from make_tables(results["benchmarks"])
    else:
        yield f"there are no figures: {results['benchmarks']['unreadable']}"
    yield from make_probe_lines(results["probe"])


def make_probe_lines(probe: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the probe's figures, which are GB/s unless a name says otherwise."""
    yield "\n| probe | case | figure |\n|---|---|---|"
    for part, figures in probe["parts"].items():
        yield from (f"| {part} | {case} | {figure} |" for case, figure in figures.items() if case != "seconds")
    if probe["exit_code"] is None:
        yield "the probe was stopped because its time was over"


def has_succeeded(results: dict[str, Any]) -> bool:
    """Return True if tests ran and all passed, and if all benchmarks were measured."""
    tests, runs = results["tests"], results["benchmarks"]["runs"]
    passed = tests["exit_code"] == 0 and tests["passed"] and runs["exit_code"] == 0 and runs["passed"]
    return bool(passed and not runs["skipped"] and results["probe"]["exit_code"] == 0)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0, or 1 if something failed or if there is no GPU."""
    deadline = time.monotonic() + TOTAL_SECONDS
    obstacle = find_obstacle()
    if obstacle:
        print(f"make gpu needs a GPU and the packages of the tests: {obstacle}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # child processes would inherit an ignored SIGINT
    out = Path(arguments[0] if arguments else "build")
    out.mkdir(parents=True, exist_ok=True)
    code, _ = run(["setup.py", "-q", "build_ext", "--inplace"], time_left(deadline, BUILD_SECONDS))
    if not any((ROOT / "kernels").glob("_cpu*.so")):  # setup.py succeeds without a compiler
        print(f"the extension was not built (exit code {code}); NumPy is used instead", file=sys.stderr)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for results in measure(Path(folder), deadline):
            (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(make_lines(results)))
    print(f"\n{out / 'gpu.json'}")
    return 0 if has_succeeded(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
