"""Custom code: the files that configs name, and those that the code imports and names; none of them is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import random_tensors, write_folder

import expo
from expo.checkpoints.custom_code import find_code
from expo.checkpoints.files import find_other_files
from expo.checkpoints.sidecars import Code

MODEL = {"auto_map": {"AutoModel": "modeling_own.Own"}}


def found(folder: Path, files: dict[str, Any]) -> Code:
    """Return the code that is found among these files; their contents are text, or an object for a JSON file."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (folder / name).write_bytes(data)
    return find_code(find_other_files(str(folder), ()))


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "a.C", "AutoModel": "b.M"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "a.C", "AutoModel": "b.M"}}}),
        ("config.json", {"custom_pipelines": {"pair": {"impl": "a.P"}, "other": {"impl": "b.P", "pt": ["AutoModel"]}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.Slow", None], "AutoProcessor": "b.P"}}),
        ("tokenizer_config.json", {"auto_map": ["a.Slow", "b.Fast"]}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "a.I", "AutoProcessor": "b.P"}}),
        (
            "processor_config.json",
            {"image_processor": {"auto_map": {"AutoImageProcessor": "a.I"}}, "auto_map": {"x": "b.P"}},
        ),
        ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "a.V", "AutoProcessor": "b.P"}}),
        (
            "modules.json",
            [{"idx": 0, "type": "a.T"}, {"idx": 1, "type": "b.T"}, {"type": "sentence_transformers.models.P"}],
        ),
    ],
)
def test_configs_name_code(tmp_path: Path, config: str, value: Any) -> None:
    assert found(tmp_path, {config: value, "a.py": "", "b.py": "", "c.py": ""}) == (frozenset({"a.py", "b.py"}), ())


def test_imports_are_followed_through_modules_and_packages(tmp_path: Path) -> None:
    files = {
        "config.json": MODEL,
        "modeling_own.py": "from .one import x\nfrom . import two, pack\nimport os, three\nfrom four import y\n",
        "one.py": "def f():\n    from .deep.er.five import z\n",
        "two.py": "try:\n    from .modeling_own import Own\nexcept ImportError:\n    from .gone import Own\n",
        "pack/__init__.py": "from .six import *\nfrom ..seven import s\n",
        "pack/six.py": "from . import eight\nfrom ....above import w\n",
        "pack/eight.py": "", "deep/__init__.py": "", "deep/er/five.py": "from .. import nine", "deep/nine.py": "",
        "seven.py": "", "three.py": "", "four.py": "", "pack/unused.py": "", "above.py": "",
    }  # fmt: skip
    code, notes = found(tmp_path, files)
    assert code == set(files) - {"config.json", "three.py", "four.py", "pack/unused.py", "above.py"}
    assert notes == ()


def test_files_that_code_names_in_full_come_along(tmp_path: Path) -> None:
    files = {
        "config.json": MODEL,
        "modeling_own.py": 'FILES = {"vocab_file": "own.words"}\nLOAD = ["./kernels/k.cu", "see data.txt"]\n',
        "own.words": "a", "kernels/k.cu": "", "data.txt": "",
    }  # fmt: skip
    assert found(tmp_path, files).files == {"modeling_own.py", "own.words", "kernels/k.cu"}


def test_code_in_another_repository_and_code_that_is_not_there(tmp_path: Path) -> None:
    config = {
        "auto_map": {"AutoConfig": "org/repo--modeling_own.C", "AutoModel": "gone.M", "x": "../out.M", "y": "", "z": 3}
    }
    assert found(tmp_path, {"config.json": config, "modeling_own.py": ""}) == Code()


def test_a_generation_method_that_comes_with_the_model(tmp_path: Path) -> None:
    files = {
        "custom_generate/generate.py": "from .beam import search", "custom_generate/beam.py": "",
        "custom_generate/requirements.txt": "x", "custom_generate/notes.txt": "",
    }  # fmt: skip
    assert found(tmp_path, files).files == set(files) - {"custom_generate/notes.txt"}


@pytest.mark.parametrize(
    "text", ["from .one import", "print 'two'", "\0", "(" * 500, "x = " + "-" * 200_000 + "1", b"\xff\xfe\0"],
    ids=["cut off", "Python 2", "zero byte", "parentheses", "deep", "bytes"],
)  # fmt: skip
def test_code_that_is_not_python_comes_along_and_is_named(tmp_path: Path, text: Any) -> None:
    code, (note,) = found(tmp_path, {"config.json": MODEL, "modeling_own.py": text, "one.py": ""})
    assert code == {"modeling_own.py"}
    assert note.startswith("aligned's modeling_own.py cannot be parsed (")
    assert note.endswith("so files that it imports may be left out: `carry` takes them along")


def test_odd_escapes_are_nobody_s_business(tmp_path: Path) -> None:
    assert (
        found(tmp_path, {"config.json": MODEL, "modeling_own.py": "X = '\\d'\nfrom .one import y", "one.py": ""}).notes
        == ()
    )


@pytest.mark.parametrize("text", ["{", "[" * 100_000, b"\xff"], ids=["cut off", "deep", "bytes"])
def test_a_config_that_is_not_json(tmp_path: Path, text: Any) -> None:
    code, (note,) = found(tmp_path, {"tokenizer_config.json": text, "one.py": ""})
    assert code == frozenset()
    assert note.startswith(
        "aligned's tokenizer_config.json cannot be read, so custom code that it may name is left out: "
    )


def test_a_file_that_is_too_large_to_be_code(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").touch()
    os.truncate(tmp_path / "modeling_own.py", 1 << 34)
    code, (note,) = found(tmp_path, {"config.json": MODEL})
    assert code == {"modeling_own.py"}
    assert f"({1 << 34} bytes, but at most 10000000 are read)" in note


def test_in_a_merge_code_comes_along_unrun_and_what_was_not_found_out_is_said(tmp_path: Path) -> None:
    tensors = {"w": ("BF16", (8, 8))}
    write_folder(tmp_path / "sft", random_tensors(tensors, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors(tensors, 2), config=MODEL)
    (aligned / "modeling_own.py").write_text(
        "from .helper import x\nopen('/proc/self/no such file')\nraise SystemExit(9)\n"
    )
    (aligned / "helper.py").write_text("raise SystemExit(9)\nno Python this\n")
    (aligned / "train.py").write_text("")
    merged = expo.merge(tmp_path / "sft", aligned, 0.5, tmp_path / "out")
    assert {"modeling_own.py", "helper.py"} < set(os.listdir(tmp_path / "out"))
    assert dict(merged.left_out) == {"train.py": "code that aligned's configs do not name"}
    warning = merged.warnings[0]
    assert warning.startswith("aligned's helper.py cannot be parsed (")
