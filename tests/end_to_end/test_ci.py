"""CI pins every dependency within its range, runs every test once, and has valid workflows."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
TARGETS = ("test", "test-all")
MAKE_VARIABLES = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")  # a make that has started these tests sets them
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def requirements() -> list[Requirement]:
    """Return the requirements in setup.py, with the extras that `make test` installs."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(arguments["extras_require"])
    texts = [*ast.literal_eval(arguments["install_requires"]), *extras["test"], *extras["bench"]]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    assert len(requirements()) > 15
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_constraints_are_names_and_versions_alone() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)] == []
    assert len(pins()) == len(lines), "a name is there twice"
    assert "expo-merge" not in pins()


def test_ci_runs_with_the_constraints() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "PIP_CONSTRAINT=$PWD/.ci/constraints.txt" in text
    found = re.search(r"^export TORCH=torch==(\S+)\nmake test\nmake test-all\n", text, re.MULTILINE)
    assert found
    assert found[1] == pins()["torch"]


def runs_of_pytest(target: str) -> list[list[str]]:
    """Return the words of the commands by which `make TARGET` starts pytest, without running them."""
    environment = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
    command = ["make", "--dry-run", target]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in printed.splitlines() if "-m pytest" in line]


def selected(run: Sequence[str], markers: Mapping[str, bool]) -> bool:
    """Return True if this run of pytest selects a test that has these markers."""
    expression = run[run.index("-m", run.index("pytest")) + 1]
    return bool(eval(expression, {"__builtins__": {}}, dict(markers)))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("exhaustive", [False, True])
def test_ci_runs_every_test_once_whatever_its_markers(alone: bool, exhaustive: bool) -> None:
    markers = {"alone": alone, "exhaustive": exhaustive}
    runs = {target: [run for run in runs_of_pytest(target) if selected(run, markers)] for target in TARGETS}
    assert {target: len(commands) for target, commands in runs.items()} == {
        "test": not exhaustive,
        "test-all": exhaustive,
    }
    (run,) = (run for commands in runs.values() for run in commands)
    assert ("-n" in run) is not alone


def test_make_check_runs_a_part_of_make_test() -> None:
    (check,), (test, _) = runs_of_pytest("check"), runs_of_pytest("test")
    assert check[: len(test)] == test
    assert len(check) > len(test)
    assert all((ROOT / word.removeprefix("--ignore=")).exists() for word in check[len(test) :])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_can_be_read_and_name_no_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert {"name", "jobs", "permissions"} < {str(key) for key in workflow}
    assert True in workflow, "YAML 1.1 takes `on` for True"
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert all(bool(step.get("uses")) != bool(step.get("run")) for step in job["steps"])
    assert "://" not in text


def test_the_newest_versions_are_tested_every_week_and_the_pinned_ones_on_every_push() -> None:
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
    assert set(found) == {"ci", "newest"}
    assert set(found["newest"][True]) == {"schedule", "workflow_dispatch"}
    runs = {
        name: [step["run"] for step in each["jobs"]["test"]["steps"] if "run" in step] for name, each in found.items()
    }
    assert runs == {"ci": [".ci/run"], "newest": ["make test TORCH=torch"]}
    assert "push" in found["ci"][True]
