"""Everything that needs a GPU, in one command of at most 9 minutes: python -m bench.gpu [FOLDER] (`make gpu`).

Builds the extension in place, runs the tests that are marked `gpu` and then `bench_gpu.py`; writes FOLDER/gpu.json and
prints it as tables. Nothing is installed or downloaded: needed are torch, triton, setuptools, and the packages of
NEEDED. What is missing where no registry can be reached comes along as wheels: `pip download --no-deps -d wheels NAME`
elsewhere, `pip install --no-index --no-deps wheels/*.whl` there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
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
    *("pytest", "pytest_benchmark", "hypothesis"),  # the tests' own: hypothesis where they are collected
)
BUILD, TESTS, BENCHMARKS, GRACE = 45, 250, 190, 15  # seconds at most, GRACE after an interrupt of each: 530 in all
ELEMENTS = 64 << 20  # of a tensor that is benchmarked, in bf16: most of the time goes into checking its result
# A warning is an error in the project's tests, where versions are pinned; here only the one that kernels are given up.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-W", "error::RuntimeWarning", "-m", "gpu")


def obstacle() -> str:
    """Return why nothing can be run here, or ""."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    return f"these packages are missing: {', '.join(missing)}; see the head of bench/gpu.py" if missing else ""


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


def counts(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, from JUnit's XML, and the names of those that failed."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name", ""))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "names_of_failed": failed}


def measure(folder: Path) -> dict[str, Any]:
    """Build, test and benchmark; return all that is to be kept."""
    import torch
    import triton

    from bench.bench_gpu import driver

    tests, benchmarks = folder / "tests.xml", folder / "benchmarks.json"
    code, seconds = run([*PYTEST, "tests", f"--junitxml={tests}"], TESTS)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "tests": {**counts(tests), "exit_code": code, "seconds": round(seconds, 1)},
    }
    more = ["bench/bench_gpu.py", "--benchmark-only", f"--benchmark-json={benchmarks}"]
    code, seconds = run([*PYTEST, *more], BENCHMARKS, EXPO_BENCH_GPU_ELEMENTS=str(ELEMENTS))
    raw = benchmarks.read_text() if benchmarks.exists() else ""
    found["benchmarks"] = {**(keep(json.loads(raw)) if raw else {}), "exit_code": code, "seconds": round(seconds, 1)}
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Return what is printed: the GPU, the tests, and a table of the benchmarks."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"{found['device']}, driver {found['driver']}, {versions}"
    tests = found["tests"]
    yield (
        f"\n| tests | passed | failed | skipped | s |\n|---|---|---|---|---|\n"
        f"| `pytest -m gpu` | {tests['passed']} | {tests['failed']} | {tests['skipped']} | {tests['seconds']} |"
    )
    yield from (f"failed: {name}" for name in tests["names_of_failed"][:20])
    if tests["exit_code"] is None:
        yield "the tests were stopped for want of time: not all were run"
    if "benchmarks" in found["benchmarks"]:
        yield from tables(found["benchmarks"])
    if found["benchmarks"]["exit_code"] != 0:
        yield f"\nthe benchmarks ended with {found['benchmarks']['exit_code']}: what is missing above was not measured"


def succeeded(found: dict[str, Any]) -> bool:
    """Return whether tests ran and all passed, and the benchmarks came to their end."""
    tests = found["tests"]
    return bool(tests["exit_code"] == 0 and tests["passed"] and found["benchmarks"]["exit_code"] == 0)


def main(arguments: Sequence[str]) -> int:
    """Return 0, or 1 where something failed or there is no GPU."""
    why = obstacle()
    if why:
        print(f"make gpu needs a GPU and what the tests need: {why}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children would inherit that it is ignored
    out = Path(arguments[0] if arguments else "build")
    out.mkdir(parents=True, exist_ok=True)
    code, _ = run(["setup.py", "-q", "build_ext", "--inplace"], BUILD)
    if code != 0:
        print("the extension was not built; NumPy takes its place", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(found)))
    print(f"\n{out / 'gpu.json'}")
    return 0 if succeeded(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
