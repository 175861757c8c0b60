"""Peak memory against the size of a checkpoint: ours over sparse inputs, and beside rivals over random ones.

A sparse file's pages are zeros when they are read, so they count as memory as others do, and no disk has to hold them;
the output is written in full, measured and deleted. One round: a peak is no time.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.rivals import ALPHA, ROOT, baseline_command, expo_command, fresh
from bench.rounds import close, exact
from bench.sizes import GROWING, SLOW_ALSO, size_id

EVERY = 0.005  # seconds between two looks


def peak(command: Sequence[object]) -> dict[str, float]:
    """Peak of resident memory, mapped pages included, and the highest anonymous part seen, in MB."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields and fields["Name"].strip().startswith("python"):
            resident = int(fields["VmHWM"].split()[0])
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
        time.sleep(EVERY)
    assert process.returncode == 0
    return {"resident_mb": resident * 1024 / 1e6, "anonymous_mb": anonymous * 1024 / 1e6}


def _measure(benchmark: Any, pair: Path, command: Sequence[object]) -> None:
    fresh(pair)
    benchmark.group = "peak memory"
    found = benchmark.pedantic(peak, args=(command,), rounds=1)
    size = sum(path.stat().st_size for path in (pair / "aligned").glob("*.safetensors"))
    benchmark.extra_info.update(checkpoint_bytes=size, **{name: round(value, 1) for name, value in found.items()})


@pytest.mark.parametrize("sparse_pair", GROWING, indirect=True, ids=size_id)
def test_peak_memory(benchmark: Any, sparse_pair: Path) -> None:
    _measure(benchmark, sparse_pair, expo_command(sparse_pair, ALPHA))


@pytest.mark.parametrize("pair", SLOW_ALSO, indirect=True, ids=size_id)
@pytest.mark.parametrize("program", ["expo", "loop", "paper", "short"])
def test_memory_of_programs(benchmark: Any, pair: Path, program: str) -> None:
    """Random weights: the rivals, and ours beside them."""
    command = expo_command(pair, ALPHA) if program == "expo" else baseline_command(program, pair)
    _measure(benchmark, pair, command)
    (exact if program in ("expo", "loop") else close)(pair / "out")
