"""What CI runs: every dependency pinned within its range, and workflows that can be read."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def requirements() -> list[Requirement]:
    """What setup.py asks for, with the extras that `make test` installs."""
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
    found = re.search(r"^TORCH=torch==(\S+) make test$", text, re.MULTILINE)
    assert found
    assert found[1] == pins()["torch"]


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
