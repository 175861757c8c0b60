"""A client of the test hub, whose calls run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expo.inputs.hub_ids import Snapshot

ROOT = Path(__file__).parents[2]


# This program fetches each (id, weights_only, quiet) of its argument, and prints the snapshot or the error's message.
DRIVER = """
import json, os, resource, sys
from expo.inputs import hub
from expo.inputs.hub_ids import parse_hub_id
from expo.errors import CheckpointError

assert not {"huggingface_hub", "torch", "transformers", "numpy"} & set(sys.modules), "imported for nothing"
if limit := int(os.environ.get("FILE_LIMIT", 0)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for text, weights_only, quiet in json.loads(sys.argv[1]):
    try:
        print(json.dumps(hub.fetch(parse_hub_id(text), weights_only, quiet)), flush=True)
    except CheckpointError as error:
        print(json.dumps(str(error)), flush=True)
assert not {"torch", "transformers"} & set(sys.modules)
from huggingface_hub.utils import are_progress_bars_disabled
assert are_progress_bars_disabled() == ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ)
"""


# This program plans each (sft, aligned, further options) of its argument, and prints the JSON or the error's message.
PLANS = """
import contextlib, io, json, os, sys
from expo.fast import main

for sft, aligned, *more in json.loads(sys.argv[1]):
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        words = ["--sft", sft, "--aligned", aligned, "--alpha", "0.5", "--plan", "--json", "--quiet", *more]
        code = main(words)
    assert not os.listdir(os.environ["TMPDIR"])
    found = {**json.loads(out.getvalue()), "bytes_free": 0} if out.getvalue() else said.getvalue()
    assert code == (3 if said.getvalue() else 0), said.getvalue()
    print(json.dumps(found), flush=True)
"""


class Client:
    """Run each fetch in a process of its own, because huggingface_hub reads its variables when it is imported."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.endpoint, self.home = endpoint, home
        self.stderr = ""

    def start(self, *steps: str | tuple[str, bool, bool], **variables: str) -> subprocess.Popen[str]:
        calls = [step if isinstance(step, tuple) else (step, False, True) for step in steps]
        return self.run("-c", DRIVER, json.dumps(calls), **variables)

    def run(self, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **variables,
        }
        command = [sys.executable, "-W", "error", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)

    def plan(self, *pairs: Sequence[str | Path], **variables: str) -> list[Any]:
        """Return what --plan --json prints for each (sft, aligned, further options), or the message of its error."""
        place, temporary = self.home / "place", self.home / "tmp"
        place.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        calls = json.dumps([[str(word) for word in pair] for pair in pairs])
        into = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), **variables}
        with self.run("-c", PLANS, calls, cwd=place, **into) as process:
            stdout, self.stderr = process.communicate(timeout=60)
        assert process.returncode == 0, self.stderr
        assert str(temporary) not in stdout + self.stderr
        assert list(temporary.iterdir()) == list(place.iterdir()) == []
        return [json.loads(line) for line in stdout.splitlines()]

    def __call__(self, *steps: str | tuple[str, bool, bool], **variables: str) -> list[Any]:
        """Return the Snapshot of each step, or the message of its CheckpointError."""
        with self.start(*steps, **variables) as process:
            stdout, self.stderr = process.communicate(timeout=60)
        assert process.returncode == 0, self.stderr
        results = [json.loads(line) for line in stdout.splitlines()]
        return [item if isinstance(item, str) else Snapshot(*item) for item in results]
