"""DTensors and models that are spread over processes have the bits of whole tensors; two processes run the checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="torch before 2.6 has no public fully_shard")
distributed_checks = pytest.importorskip("distributed_checks")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return the error of each check, "" if it passed, for each of two processes."""
    store = tmp_path_factory.mktemp("store") / "file"
    command = [sys.executable, "-W", "ignore", distributed_checks.__file__, str(store)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(text.splitlines()[-1]) if text else {"": complaint} for text, complaint in outputs]


@pytest.mark.parametrize("check", distributed_checks.CHECKS)
def test_in_two_processes(check: str, errors: list[dict[str, str]]) -> None:
    assert [each.get(check, each) for each in errors] == ["", ""]


def test_that_a_plain_tensor_imports_no_dtensor() -> None:
    code = """
import sys, torch, expo
before = {name for name in sys.modules if name.startswith("torch.distributed")}
x = torch.ones(3)
expo.extrapolate(x, x, 0.3, out=x)
expo.Live(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).alpha = 0.5
assert not {name for name in sys.modules if name.startswith("torch.distributed.tensor")} - before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
