"""The command line as a process: its output, exit codes and imports, and how it ends when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoint_files import kept, random_tensors, read_folder, sparse_file, staging_folder, write_folder
from cpu_time import at_most

import expo
from expo.cli import with_options
from expo.demo import ALIGNED, SFT

ROOT = Path(__file__).parents[2]
PAIR = ("--sft", str(SFT), "--aligned", str(ALIGNED))


class Ran(NamedTuple):
    """The exit code and the output of a process."""

    code: int
    out: str
    err: str


def run(*arguments: object, cwd: Path | None = None, module: str = "expo.fast", **environment: str) -> Ran:
    """Run python -m expo.fast with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, cwd=cwd, env=env(**environment), timeout=120,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode())


def env(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **more}


def steady(text: str, folder: Path) -> str:
    """Return printed text without the parts that differ from run to run: times, rates, free space and paths."""
    text = text.replace(str(folder), "TMP").replace(str(SFT), "SFT").replace(str(ALIGNED), "ALIGNED")
    text = re.sub(r"in \d+\.\d\d s, [\d.]+ (kB|MB|GB)/s", "in SECONDS s, RATE/s", text)
    text = re.sub(r"; [\d.]+ (MB|GB) are free", "; FREE are free", text)
    text = re.sub(r"\w+, \d+ workers \([^)]*\)", "ENGINE, N workers (WHY)", text)
    return re.sub(r"memory about [\d.]+ MB", "memory about MEMORY", text.replace("through the page", "past the page"))


# --- a merge ----------------------------------------------------------------------------------------------------------

SUMMARY = """\
4.0 MB read, 2.0 MB written in SECONDS s, RATE/s moved
  tensors  38 extrapolated, 0 copied, 0 dropped
  engine   ENGINE, N workers (WHY); written past the page cache
  alpha 0.3  54.6% of elements changed, |change| / |aligned| 0.00248, 0 non-finite
           -> TMP/out
"""


def test_a_merge_prints_a_summary_and_nothing_else(tmp_path: Path) -> None:
    ran = run(*PAIR, "--alpha", 0.3, "--out", tmp_path / "out")
    assert ran.err == ""
    assert steady(ran.out, tmp_path) == SUMMARY
    assert ran.code == 0
    expo.merge(SFT, ALIGNED, 0.3, tmp_path / "same")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "same")


def test_all_options_at_once(tmp_path: Path) -> None:
    pair = odd_pair(tmp_path)
    (tmp_path / "x-0.1").mkdir()
    ran = run(
        *pair, "--alpha", 0.1, -0.3, "--out", tmp_path / "x-{alpha}", *ODD_OPTIONS,
        *("--engine", "numpy", "--device", "cpu", "--overwrite", "--verify"),
    )  # fmt: skip
    assert steady(ran.err, tmp_path) == ODD_WARNING
    assert steady(ran.out, tmp_path) == ODD_SUMMARY
    assert ran.code == 0
    assert sorted(os.listdir(tmp_path)) == ["aligned", "sft", "x--0.3", "x-0.1"]


def odd_pair(folder: Path) -> tuple[str, ...]:
    """Write two checkpoints that differ in more than their numbers."""
    sft = write_folder(folder / "sft", random_tensors(ODD_SFT, 1))
    aligned = write_folder(folder / "aligned", random_tensors(ODD_ALIGNED, 2))
    (aligned / "README.md").write_text("about aligned")
    return ("--sft", str(sft), "--aligned", str(aligned))


ODD_OPTIONS = (
    *("--alpha-for", "a=0", "--alpha-for", "b=0.7"),
    *("--on-unpaired", "aligned", "--on-mismatch", "aligned"),
)
ODD_SFT: dict[str, tuple[str, tuple[int, ...]]] = {
    "a": ("BF16", (8, 8)), "b": ("F32", (8, 8)), "e": ("BF16", (9,)), "gone": ("BF16", (2,)), "i": ("I64", (4,)),
}  # fmt: skip
ODD_ALIGNED: dict[str, tuple[str, tuple[int, ...]]] = {
    "a": ("BF16", (8, 8)), "b": ("F32", (8, 8)), "e": ("BF16", (8,)), "new": ("BF16", (3,)), "i": ("I64", (4,)),
}  # fmt: skip
ODD_SUMMARY = """\
694 bytes read, 9.1 kB written in SECONDS s, RATE/s moved
  tensors  1 extrapolated, 4 copied, 1 dropped
           copied a: alpha is 0
           copied e: sft has BF16 [9]
           copied new: not in sft
           copied i: I64 is not a floating-point dtype
           dropped gone: only in sft
           left out README.md: describes aligned; the output has a card of its own
  engine   ENGINE, N workers (WHY); written past the page cache
  alpha 0.1  100.0% of elements changed, |change| / |aligned| 0.963, 0 non-finite
           -> TMP/x-0.1 (verified)
  alpha -0.3  100.0% of elements changed, |change| / |aligned| 0.963, 0 non-finite
           -> TMP/x--0.3 (verified)
"""
ODD_WARNING = (
    "expo: warning: aligned - sft is 1.4 times as large as aligned itself; "
    "for a model and the one it was trained from it is below 0.1: are the two models unrelated?\n"
)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_several_alphas_and_negative_ones(tmp_path: Path, options: Sequence[str]) -> None:
    ran = run(*PAIR, "--alpha", -0.1, 0, 0.3, *options, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["aligned-expo--0.1", "aligned-expo-0", "aligned-expo-0.3"]
    assert read_folder(tmp_path / "aligned-expo-0") == read_folder(ALIGNED)


@pytest.mark.parametrize("text", ["-1e-3", "-.5", "-2"])
def test_any_negative_number_is_an_alpha(tmp_path: Path, text: str) -> None:
    ran = run(*PAIR, "--alpha", text, "--plan", "--json", cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    assert run(*PAIR, "--alpha", 0.3, "--out", tmp_path / "out", "--quiet") == (0, "", "")
    assert run(*PAIR, "--alpha", 0.3, "--out", tmp_path / "other", "--quiet", "--plan") == (0, "", "")
    assert os.listdir(tmp_path) == ["out"]


def test_warnings_go_to_stderr_and_the_exit_code_stays_0(tmp_path: Path) -> None:
    ran = run("--sft", ALIGNED, "--aligned", ALIGNED, "--alpha", 0.3, "--out", tmp_path / "out", "--quiet")
    message = "sft and aligned are equal: the output is aligned; is one of the two paths wrong?"
    assert ran == (0, "", f"expo: warning: {message}\n")


def test_json_is_one_object_with_every_field(tmp_path: Path) -> None:
    ran = run(*PAIR, "--alpha", 0.3, 0.5, "--out", tmp_path / "out{alpha}", "--json", "--verify")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    result = json.loads(ran.out)
    assert list(result) == [field.name for field in fields(expo.Merged)]
    assert [list(output) for output in result["outputs"]] == [[field.name for field in fields(expo.Output)]] * 2
    assert [output["path"] for output in result["outputs"]] == [f"{tmp_path}/out0.3", f"{tmp_path}/out0.5"]
    assert (result["extrapolated"], result["copied"], result["verified"]) == (38, [], True)
    assert result["outputs"][0]["relative_change"] == pytest.approx(0.3 * result["relative_distance"], rel=1e-6)


def test_json_says_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    for name, value in (("sft", -3e38), ("aligned", 3e38)):
        write_folder(tmp_path / name, {"w": ("F32", (4,), np.array([1, value, value, value], "<f4").tobytes())})
    for name, value in (("sft", 1e30), ("aligned", 2e30)):
        write_folder(tmp_path / f"big-{name}", {"w": ("F32", (2,), np.full(2, value, "<f4").tobytes())})
    ran = run(
        *("--sft", tmp_path / "big-sft", "--aligned", tmp_path / "big-aligned", "--alpha", 0.3),
        *("--out", tmp_path / "out", "--json"),
    )
    result = json.loads(ran.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert ran.code == 0
    assert result["relative_distance"] is None
    assert result["outputs"][0]["relative_change"] is None


# --- a plan -----------------------------------------------------------------------------------------------------------

PLAN = """\
copy         a    BF16 [8, 8]             alpha is 0  128 bytes
extrapolate  b    F32 [8, 8]              alpha 0.7 0.7  256 bytes
copy         e    BF16 [8]                sft has BF16 [9]  16 bytes
copy         new  BF16 [3]                not in sft  6 bytes
copy         i    I64 [4]                 I64 is not a floating-point dtype  32 bytes
drop         gone  only in sft
carry        config.json
leave out    README.md: describes aligned; the output has a card of its own
reads 694 bytes, writes 9.1 kB; FREE are free
memory about MEMORY; engine ENGINE, N workers (WHY)
-> TMP/x-0.1
-> TMP/x-0.3
"""


def test_plan_text(tmp_path: Path) -> None:
    ran = run(*odd_pair(tmp_path), "--alpha", 0.1, 0.3, "--out", tmp_path / "x-{alpha}", "--plan", *ODD_OPTIONS)
    assert ran.err == ""
    assert steady(ran.out, tmp_path) == PLAN
    assert ran.code == 0
    assert sorted(os.listdir(tmp_path)) == ["aligned", "sft"]


def test_plan_json(tmp_path: Path) -> None:
    ran = run(
        *odd_pair(tmp_path), "--alpha", 0.1, 0.3, "--out", tmp_path / "x-{alpha}", "--plan", "--json",
        *("--alpha-for", "a=0", "--on-unpaired", "aligned", "--on-mismatch", "aligned"),
    )  # fmt: skip
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    steps = {step["name"]: step for step in found["steps"]}
    assert steps["b"] == {
        "name": "b", "action": "extrapolate", "reason": "", "rows": None, "alphas": pytest.approx([0.1, 0.3], rel=1e-7),
        "dtype": "F32", "shape": [8, 8], "bytes": 256, "file": "model.safetensors",
    }  # fmt: skip
    assert {name: step["action"] for name, step in steps.items()} == {
        "a": "copy", "b": "extrapolate", "e": "copy", "i": "copy", "new": "copy"
    }  # fmt: skip
    assert (found["dropped"], found["carried"], found["problems"]) == ({"gone": "only in sft"}, ["config.json"], [])
    assert found["left_out"] == {"README.md": "describes aligned; the output has a card of its own"}
    assert found["outputs"] == [f"{tmp_path}/x-0.1", f"{tmp_path}/x-0.3"]
    assert found["bytes_written"] == 2 * (4096 + 256 + 128 + 32 + 16 + 6)
    assert found["bytes_free"] > found["bytes_written"]


def test_plan_is_printed_even_where_the_merge_would_fail(tmp_path: Path) -> None:
    ran = run(*odd_pair(tmp_path), "--alpha", 0.1, "--out", tmp_path / "out", "--plan")
    assert ran.code == 3
    assert ran.out.startswith("extrapolate  a    BF16 [8, 8]")
    assert ran.out.endswith(f"-> {tmp_path}/out\n")
    assert ran.err == (
        "expo: error: 2 tensors without a counterpart; --on-unpaired aligned keeps aligned's tensors and drops sft's:\n"
        "  new (aligned only)\n"
        "  gone (sft only)\n"
        "1 tensor whose counterpart has another shape; --on-mismatch aligned keeps aligned's tensors:\n"
        "  e: sft BF16 [9], aligned BF16 [8]\n"
    )


def test_plan_json_lists_the_problems(tmp_path: Path) -> None:
    ran = run(*odd_pair(tmp_path), "--alpha", 0.1, "--out", tmp_path / "out", "--plan", "--json")
    assert ran.code == 3
    problems = json.loads(ran.out)["problems"]
    assert [problem.partition(";")[0] for problem in problems] == [
        "2 tensors without a counterpart", "1 tensor whose counterpart has another shape"
    ]  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_plan_of_an_output_that_is_there(tmp_path: Path, options: Sequence[str]) -> None:
    (tmp_path / "out").mkdir()
    ran = run(*PAIR, "--alpha", 0.1, "--out", tmp_path / "out", "--plan", *options)
    message = f"{tmp_path}/out exists; choose another --out, or --overwrite replaces it"
    assert (ran.code, ran.err) == (4, f"expo: error: {message}\n")
    if options:
        assert json.loads(ran.out)["problems"] == [message]
    else:
        assert ran.out.count("extrapolate  ") == 38


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "nan"], "alpha must be a number that is finite in float32, got nan"),
        (["--alpha", "0.1", "0.3"], "2 alphas need an output each: put {alpha} into --out, got 'out'"),
        (["--alpha", "0.1", "0.1"], "alphas must be 1 to 64 different numbers, got [0.1, 0.1]"),
        (["--alpha", "0.1", "--alpha-for", "norm"], "--alpha-for takes REGEX=FLOAT, got 'norm'"),
        (["--alpha", "0.1", "--alpha-for", "norm=big"], "--alpha-for takes REGEX=FLOAT, got 'norm=big'"),
        (
            ["--alpha", "0.1", "--alpha-for", "(=1"],
            "--alpha-for '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (["--alpha", "0.1", "--device", "tpu"], "--device must be auto, cpu or cuda[:index], got 'tpu'"),
        (
            ["--alpha", "0.1", "--engine", "cpu", "--device", "cuda:0"],
            "--engine cpu computes on the CPU, but --device is cuda:0; leave one of them out",
        ),
    ],
)
def test_usage_errors(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    assert run(*PAIR, *arguments, "--out", "out", cwd=tmp_path) == (2, "", f"expo: error: {message}\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PAIR, "--alpha"], "argument --alpha: expected at least one argument"),
        ([*PAIR, "--alpha", "much"], "argument --alpha: invalid float value: 'much'"),
        ([*PAIR, "--alpha", "1", "--engine", "gpu"], "argument --engine: invalid choice: 'gpu'"),
        ([*PAIR, "--alpha", "1", "--over"], "unrecognized arguments: --over"),
    ],
)
def test_wrong_options_print_the_usage(arguments: Sequence[str], message: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: python -m expo.fast [-h] [--sft A] [--aligned B]")
    assert f"error: {message}" in ran.err


def test_alpha_for_splits_at_the_last_equals_sign_and_a_repeated_pattern_counts_last(tmp_path: Path) -> None:
    rules = (
        "--alpha-for",
        "norm=0.5",
        "--alpha-for",
        "layers=0.2",
        "--alpha-for",
        "norm=0.7",
        "--alpha-for",
        "(?=lm)|embed=0",
    )
    ran = run(*PAIR, "--alpha", 0.3, *rules, "--plan", "--json", cwd=tmp_path)
    alphas = {step["name"]: step["alphas"][0] for step in json.loads(ran.out)["steps"]}
    assert alphas["model.layers.1.input_layernorm.weight"] == pytest.approx(0.7)
    assert alphas["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.2)
    assert alphas["model.norm.weight"] == pytest.approx(0.7)
    assert alphas["model.embed_tokens.weight"] == 0


def test_an_output_name_may_be_any_file_name(tmp_path: Path) -> None:
    for name in (b"caf\xc3\xa9", b"\xff raw"):
        out = os.fsdecode(name)
        ran = run(*PAIR, "--alpha", 0.3, "--out", out, cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert (ran.code, ran.err) == (0, "")
        assert (tmp_path / out).is_dir()


# --- start-up time ----------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert run("--version") == (0, f"expo {expo.__version__}\n", "")


def test_help_is_quick_and_names_every_option() -> None:
    with at_most(0.5):
        ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    options = ("sft", "aligned", "alpha", "out", "alpha-for", "on-unpaired", "on-mismatch", "engine", "device", "plan")
    options += ("json", "overwrite", "resume", "digest", "verify", "quiet", "version", "help")
    assert all(f"--{name}" in ran.out for name in options)
    assert max(map(len, ran.out.splitlines())) <= 120


HEAVY = ("torch", "transformers", "numpy", "safetensors", "triton", "ml_dtypes")
IMPORTS = """
import atexit, json, runpy, sys
heavy = set(sys.argv.pop(1).split(","))
atexit.register(lambda: print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr))
runpy.run_module("expo.fast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], []),
        (["--version"], []),
        ([*PAIR, "--alpha", "0.3", "--out", "out", "--plan"], []),
        ([*PAIR, "--alpha", "0.3", "--out", "out", "--engine", "cpu"], []),
        ([*PAIR, "--alpha", "0.3", "--out", "out", "--engine", "cpu", "--verify"], ["numpy"]),
        ([*PAIR, "--alpha", "0.3", "--out", "out", "--engine", "numpy"], ["numpy"]),
        ([*PAIR, "--alpha", "0.3", "--out", "."], []),
    ],
)
def test_nothing_heavy_is_imported(tmp_path: Path, arguments: Sequence[str], heavy: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, ",".join(HEAVY), *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=env(), timeout=60,
    )  # fmt: skip
    assert json.loads(done.stderr.splitlines()[-1]) == heavy


def test_plan_of_a_70b_model_is_quick(tmp_path: Path) -> None:
    """The checkpoints have 80 layers of Llama-70B's shapes in 15 sparse shards, 138 GB each."""
    layer = {
        "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
        "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672), "input_layernorm": (8192,), "post_attention_layernorm": (8192,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": ("BF16", shape) for i in range(80) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": ("BF16", (32000, 8192)), "lm_head.weight": ("BF16", (32000, 8192))}
    shapes["model.norm.weight"] = ("BF16", (8192,))
    for role in ("sft", "aligned"):
        sparse_shards(tmp_path / role, shapes, 15)
    with at_most(3):
        ran = run("--sft", tmp_path / "sft", "--aligned", tmp_path / "aligned", "--alpha", 0.3, "--plan", cwd=tmp_path)
    assert ran.out.count("extrapolate  ") == 723
    assert "reads 275.91 GB, writes 137.95 GB" in ran.out
    if ran.code:  # the disk is smaller than the output
        assert ran.code == 4
        assert re.fullmatch(r"expo: error: aligned-expo-0\.3: .* are needed, but .* are free; .*\n", ran.err)


def sparse_shards(folder: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], shards: int) -> None:
    folder.mkdir()
    weight_map = {}
    names = list(shapes)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        sparse_file(folder / file, {name: shapes[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Write a pair of 400 MB each, whose merge takes seconds: sparse files with weights in every MiB."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {f"w{i}": ("BF16", (12500, 4096)) for i in range(4)}
    files = [sparse_file(folder / f"{role}.safetensors", shapes) for role in ("sft", "aligned")]
    bits = np.random.default_rng(1).integers(0x3C00, 0x3D00, 2048).astype("<u2")
    for k, path in enumerate(files):
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for at in range(start, path.stat().st_size - bits.nbytes, 1 << 20):
                file.seek(at)
                file.write((bits + k).tobytes())
    return ("--sft", str(files[0]), "--aligned", str(files[1]))


def start(arguments: Sequence[str], folder: Path, prepare: Callable[[], Any] | None = None) -> subprocess.Popen[bytes]:
    """Start a slow merge, and wait until its staging folder exists."""
    command = [sys.executable, "-m", "expo.fast", *arguments, "--alpha", "0.3", "--engine", "numpy"]
    process = subprocess.Popen(
        [*command, "--out", "out.safetensors"],
        cwd=folder, env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare,
    )  # fmt: skip
    while not staging_folder(folder / "out.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(0.1)
    return process


@pytest.fixture(scope="module")
def undisturbed(large: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the digest of the output of the merge that `start` starts, when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(*large, "--alpha", 0.3, "--out", "out.safetensors", "--quiet", cwd=folder).code == 0
    return digest(folder / "out.safetensors")


def digest(path: Path) -> bytes:
    """Return the digest of a large file, and remove the file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            hasher.update(part)
    path.unlink()
    return hasher.digest()


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_what_is_done(
    large: Sequence[str], tmp_path: Path, undisturbed: bytes, number: signal.Signals
) -> None:
    process = start(large, tmp_path)
    process.send_signal(number)
    interrupted(process, tmp_path)
    assert resumed(large, tmp_path)["resumed"] > 0
    assert digest(tmp_path / "out.safetensors") == undisturbed


def interrupted(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Check that an interrupted process ends as it should and leaves only its staging folder."""
    out, err = process.communicate(timeout=20)
    message = f"expo: interrupted; {with_options(kept(folder / 'out.safetensors'))}\n"
    assert (process.returncode, out, err.decode()) == (130, b"", message)
    assert os.listdir(folder) == [".out.safetensors.expo-staging"]


def resumed(large: Sequence[str], folder: Path) -> dict[str, Any]:
    """Resume the merge, check that only the output is left, and return the JSON object."""
    ran = run(*large, "--alpha", 0.3, "--out", "out.safetensors", "--resume", "--json", cwd=folder)
    assert (ran.code, ran.err) == (0, "")
    assert os.listdir(folder) == ["out.safetensors"]
    result: dict[str, Any] = json.loads(ran.out)
    return result


@pytest.mark.usefixtures("own_signals")
def test_a_second_signal_does_not_cut_the_writing_down_short(
    large: Sequence[str], tmp_path: Path, undisturbed: bytes
) -> None:
    process = start(large, tmp_path)
    for _ in range(8):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    interrupted(process, tmp_path)
    assert resumed(large, tmp_path)["resumed"] > 0
    assert digest(tmp_path / "out.safetensors") == undisturbed


@pytest.mark.usefixtures("own_signals")
def test_a_later_signal_ends_a_process_that_cannot_stop(large: Sequence[str], tmp_path: Path) -> None:
    """The engine of this process does not answer any more, as a GPU or a disk may do; the merge can be continued."""
    driver = (
        "import sys, time, expo.merging.job, expo.fast\n"
        "from expo.execution.engines import Engine\n"
        "engine = Engine('stuck', lambda *_: time.sleep(600), 'a test')\n"
        "expo.merging.job.engines_for = lambda *_: (engine, engine)\n"
        "sys.exit(expo.fast.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out.safetensors"
    words = [*large, "--alpha", "0.3", "--out", str(out), "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", driver, *words], cwd=ROOT, env=env(), stderr=subprocess.PIPE)
    try:
        while not staging_folder(out).exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        for _ in range(100):  # signals that come soon are ignored
            time.sleep(0.25)
            process.send_signal(signal.SIGINT)
            if process.poll() is not None:
                break
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read() == b"expo: ended before the work in progress was stopped\n"
    assert os.listdir(tmp_path) == [staging_folder(out).name]
    assert run(*words, "--resume", cwd=tmp_path).code == 0
    out.unlink()


def test_a_hangup_that_nohup_ignores_stays_ignored(large: Sequence[str], tmp_path: Path) -> None:
    process = start(large, tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert os.listdir(tmp_path) == ["out.safetensors"]
    (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_after_a_kill_the_leftover_is_named_and_can_be_gone_on_with_or_not(
    large: Sequence[str], tmp_path: Path, undisturbed: bytes, option: str
) -> None:
    process = start(large, tmp_path)
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == [".out.safetensors.expo-staging"]
    arguments = (*large, "--alpha", "0.3", "--out", "out.safetensors", "--quiet")
    ran = run(*arguments, cwd=tmp_path)
    staging = f"{tmp_path}/.out.safetensors.expo-staging"
    fixes = "--resume continues it, --overwrite starts anew"
    assert ran == (4, "", f"expo: error: {staging} was left by an interrupted merge: {fixes}\n")
    assert os.listdir(tmp_path) == [".out.safetensors.expo-staging"]
    assert run(*arguments, option, cwd=tmp_path) == (0, "", "")
    assert os.listdir(tmp_path) == ["out.safetensors"]
    assert digest(tmp_path / "out.safetensors") == undisturbed


@pytest.mark.parametrize("options", [("--plan",), ()])
def test_a_reader_that_has_gone_is_no_crash(tmp_path: Path, options: Sequence[str]) -> None:
    """If nobody reads the summary, as after `| head`, the merge still succeeds."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "expo.fast", *PAIR, "--alpha", "0.3", "--out", "out", *options],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env(), timeout=60,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert os.listdir(tmp_path) == ([] if options else ["out"])


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("`on_mismatch='rows'` or `on_unpaired`", "--on-mismatch rows or --on-unpaired"),
        ("choose another `out`, or `overwrite=True` replaces it", "choose another --out, or --overwrite replaces it"),
        (r"`alpha_for={r'^(a|b)\.weight$': 0}` keeps", r"--alpha-for '^(a|b)\.weight$=0' keeps"),
        ("`max_shard_size=5000` and `alphas=[0]`", "--max-shard-size 5000 and --alphas 0"),
        ("run `git lfs pull`, or `lm_head`", "run `git lfs pull`, or `lm_head`"),
    ],
)
def test_the_command_line_names_options_where_the_library_names_parameters(message: str, printed: str) -> None:
    assert with_options(message) == printed
