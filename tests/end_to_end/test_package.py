"""The installed package: its layout, names and wheel, the cost of an import, and a build without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import expo

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names() -> None:
    assert expo.__all__ == [
        "Cancelled",
        "CheckpointError",
        "Comparison",
        "EngineError",
        "ExpoError",
        "Live",
        "Merged",
        "Output",
        "OutputError",
        "PlanError",
        "RankError",
        "SearchResult",
        "UsageError",
        "compare",
        "extrapolate",
        "merge",
        "search_alpha",
        "stream",
    ]
    assert all(getattr(expo, name).__doc__ for name in expo.__all__)


def test_every_error_is_an_expo_error_with_an_exit_code() -> None:
    errors = [getattr(expo, name) for name in expo.__all__ if isinstance(getattr(expo, name), type)]
    codes = {error.__name__: error.exit_code for error in errors if issubclass(error, expo.ExpoError)}
    assert codes == {
        "Cancelled": 130,
        "CheckpointError": 3,
        "EngineError": 2,
        "ExpoError": 1,
        "OutputError": 4,
        "PlanError": 3,
        "RankError": 4,
        "UsageError": 2,
    }


def test_import_is_light() -> None:
    heavy = "{'numpy', 'torch', 'transformers', 'triton', 'safetensors'}"
    assert python(f"import sys, expo; print({heavy} & set(sys.modules))", ROOT) == "set()"


def test_kernels_does_not_shadow_the_package_of_that_name(tmp_path: Path) -> None:
    """Another distribution's `kernels` is importable, also in the repository's root, and ours is expo.kernels."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OTHER = True")
    code = "import kernels, expo.kernels.contract; print(kernels.OTHER, int(expo.kernels.contract.working_alpha(2)))"
    for cwd in (ROOT, tmp_path):
        assert python(code, cwd, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}") == "True 2"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module", params=["compiled", "no compiler"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Build a wheel from a copy of the repository, with a C compiler and without one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"], text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # the index may still list a deleted file
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    environment = dict(os.environ) if request.param == "compiled" else {**os.environ, "CC": "/bin/false"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], env=environment, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return request.param, built


def test_wheel_is_complete_and_merges_from_elsewhere(wheel: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = wheel
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"expo/py.typed", "expo/kernels/numerics.py", "expo/demo/sft/config.json", "expo/fast.py"} <= names
    assert {f"expo/{path.relative_to(ROOT / 'expo')}" for path in (ROOT / "expo").rglob("*.py")} <= names
    assert any("_cpu." in name and name.endswith(".so") for name in names) == (kind == "compiled")
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    code = (
        "import expo, expo.demo; merged = expo.merge(expo.demo.SFT, expo.demo.ALIGNED, 0.5, 'out');"
        "print(expo.__file__.startswith(%r), merged.engine, merged.why)"
    )
    engine = "cpu compiled, as fast as memory" if kind == "compiled" else "numpy the compiled engine is not built"
    printed = python(code % str(tmp_path / "site"), tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert printed == f"True {engine}"
