"""The command line of the comparison: the table, the JSON, exit codes, and reports that cannot be written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import random_tensors, write_folder
from moved_pairs import Shapes, llama_shapes, write_pair

from expo.demo import ALIGNED, SFT
from expo.diff import Comparison, compare, comparison, report
from expo.diff.__main__ import main
from expo.diff.table import make_table
from expo.errors import OutputError

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def run(*arguments: object) -> tuple[int, str, str]:
    """Return the exit code of the command, its stdout and its stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "expo.diff", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


TABLE = """\
sft -> aligned
relative norm |aligned - sft| / |aligned|:
layers   q_proj   k_proj   v_proj   o_proj  gate_proj  up_proj  down_proj    norms      all
0        6.1e-3   6.7e-3   1.8e-2   1.9e-2     9.4e-3   9.6e-3     9.7e-3   1.6e-3   9.0e-3
1        8.6e-3   8.7e-3   1.1e-2   1.1e-2     9.2e-3   9.8e-3     9.9e-3   6.4e-4   9.4e-3
2        8.8e-3   8.8e-3   1.3e-2   1.2e-2     9.1e-3   9.8e-3     1.0e-2   1.1e-3   9.6e-3
3        9.2e-3   9.4e-3   1.2e-2   1.1e-2     8.6e-3   9.1e-3     9.4e-3   1.1e-3   9.1e-3
outside of layers: embeddings 6.3e-3, norms 0
most changed tensors:
  model.layers.0.self_attn.o_proj.weight   1.9e-2  1-cos  1.8e-4   91.4% changed
  model.layers.0.self_attn.v_proj.weight   1.8e-2  1-cos  1.6e-4   90.7% changed
  model.layers.2.self_attn.v_proj.weight   1.3e-2  1-cos  8.3e-5   87.5% changed
  model.layers.3.self_attn.v_proj.weight   1.2e-2  1-cos  7.6e-5   87.5% changed
  model.layers.2.self_attn.o_proj.weight   1.2e-2  1-cos  6.9e-5   86.0% changed
  model.layers.1.self_attn.v_proj.weight   1.1e-2  1-cos  6.3e-5   85.5% changed
in all: 38 tensors, 82.0% of 1,000,576 elements changed, max |difference| 0.00391
        relative norm 0.008283, cosine 0.999965698, 1-cos 3.43e-05, angle 0.475 degrees
        1 tensor the same in both, 0 in one alone, 0 not compared, 0 elements not finite
4.0 MB read in SECONDS
"""


def test_the_table_of_the_demo() -> None:
    code, out, err = run("--sft", SFT, "--aligned", ALIGNED)
    assert (code, err) == (0, "")
    assert re.sub(r"read in .*", "read in SECONDS", out) == TABLE


def test_json_on_stdout_and_in_a_file_is_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, {"x": ("F32", (9,)), "zero": ("F32", (3,))})
    write_folder(aligned_folder, {**random_tensors({"x": ("F32", (9,))}, 2), "zero": ("F32", (3,), bytes(12))})
    out = tmp_path / "report.json"
    pair = ["--sft", str(sft_folder), "--aligned", str(aligned_folder)]
    assert main([*pair, "--json", "--quiet", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    printed_json = json.loads(printed.out, parse_constant=lambda constant: pytest.fail(constant))
    assert printed_json == json.loads(out.read_text())
    assert printed_json["tensors"][1]["relative_norm"] is None
    assert printed_json["tensors"][0]["relative_norm"] == compare(sft_folder, aligned_folder).tensors[0].relative_norm
    assert "expo: warning: aligned - sft is" in printed.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = compare(*write_pair(tmp_path, llama_shapes(1)))
    (tmp_path / "x.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        report.write_report(changes, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "sft", "x.json"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_large_model_fits_a_screen(width: int, tmp_path: Path) -> None:
    lines = list(make_table(compare(*write_pair(tmp_path, llama_shapes(80))), width))
    assert len(lines) <= 45
    assert max(map(len, lines[:19])) <= width
    assert lines[3].startswith("0-4 ")
    assert ("others" in lines[2]) == (width < 100)


def test_each_stack_has_a_table_of_its_own(tmp_path: Path) -> None:
    names = [f"{s}.block.{i}.layer.0.{s}Attention.q.weight" for s in ("encoder", "decoder") for i in range(2)]
    shapes: Shapes = dict.fromkeys(names, ("F32", (8, 8)))
    lines = list(make_table(compare(*write_pair(tmp_path, shapes)), 80))
    assert [line.split() for line in (lines[2], lines[5])] == [
        ["encoder.block", "q", "all"],
        ["decoder.block", "q", "all"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--sft and --aligned must be given"),
        (["--sft", SFT, "--aligned", "/no/such/place"], 3, "no such file"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", "x.gif"], 2, "ends in .png, .svg, .pdf, .json"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", "/no/such/x.json"], 4, "there is no folder /no/such"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", f"{ALIGNED}/config.json"], 4, "inside, the input"),
    ],
)
def test_errors(arguments: list[object], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(map(str, arguments))) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("expo: error: ")
    assert message in printed.err


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> Comparison:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", interrupted)
    assert main(["--sft", str(SFT), "--aligned", str(ALIGNED)]) == 130
    assert capsys.readouterr().err.endswith("expo: interrupted; nothing was left behind\n")


def test_help_imports_no_numpy_and_no_torch() -> None:
    code = (
        "import sys; from expo.diff.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'numpy', 'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
