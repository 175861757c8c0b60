"""How much memory does a merge take at its peak, for checkpoints of growing size, and compared with rivals?

The pages of a sparse file are zeros when they are read. They count as memory like other pages, and need no disk. The
output is written in full, measured and deleted. The peak is measured in one round.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.result_checks import check_close, check_exact
from bench.rivals import ALPHA, ROOT, expo_command, program_command, remove_outputs
from bench.rounds import checkpoint_bytes
from bench.sizes import MEMORY_SIZES, SLOW_RIVAL_SIZES, size_id

SAMPLING_INTERVAL = 0.005  # seconds between two samples of the anonymous memory


def measure_peak(command: Sequence[object]) -> dict[str, float]:
    """Return the peak of resident memory, mapped pages included, and the largest anonymous part sampled, in MB."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields and fields["Name"].strip().startswith("python"):
            resident = int(fields["VmHWM"].split()[0])
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
        time.sleep(SAMPLING_INTERVAL)
    assert process.returncode == 0
    return {"resident_mb": resident * 1024 / 1e6, "anonymous_mb": anonymous * 1024 / 1e6}


def _measure(benchmark: Any, pair: Path, command: Sequence[object]) -> None:
    remove_outputs(pair)
    benchmark.group = "peak memory"
    peaks = benchmark.pedantic(measure_peak, args=(command,), rounds=1)
    rounded = {name: round(value, 1) for name, value in peaks.items()}
    benchmark.extra_info.update(checkpoint_bytes=checkpoint_bytes(pair), **rounded)


@pytest.mark.parametrize("sparse_pair", MEMORY_SIZES, indirect=True, ids=size_id)
def test_peak_memory(benchmark: Any, sparse_pair: Path) -> None:
    """Measure the merge alone, over sparse inputs."""
    _measure(benchmark, sparse_pair, expo_command(sparse_pair, ALPHA))


@pytest.mark.parametrize("pair", SLOW_RIVAL_SIZES, indirect=True, ids=size_id)
@pytest.mark.parametrize("program", ["expo", "loop", "paper", "short"])
def test_memory_of_programs(benchmark: Any, pair: Path, program: str) -> None:
    """Measure the rivals, and the merge beside them, over random weights."""
    command = expo_command(pair, ALPHA) if program == "expo" else program_command(program, pair)
    _measure(benchmark, pair, command)
    (check_exact if program in ("expo", "loop") else check_close)(pair / "out")
