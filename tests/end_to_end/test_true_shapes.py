"""The pairs of all recipes at their true size: the plan of each, and a whole merge of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from true_shapes import (
    ALIGNED_DTYPES,
    ALL_PAIRS,
    CHOSEN,
    CONFIGS,
    MORE_PAIRS,
    PAIRS,
    buffers,
    build,
    code_files,
    config,
    shapes,
    sparse_bin,
)

from expo.fast import main
from expo.inputs.recipes import recipes

ROOT = Path(__file__).parents[2]
GIGABYTE = 10**9
FREE = 20 * GIGABYTE  # more than the output's 14.5 GB
PEAK = 200_000_000  # resident bytes with mapped pages; 60 MB were measured

# This program runs the command in its arguments and prints its peak memory. A process that pytest spawned itself would
# start with pytest's peak.
MEASURE = """\
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def parameters(recipe: str) -> int:
    return sum(map(math.prod, shapes(recipe).values()))


@pytest.mark.parametrize("recipe", ALL_PAIRS)
def test_parameters_are_as_many_as_published(recipe: str) -> None:
    if recipe in PAIRS:
        assert f"{parameters(recipe) / 1e9:.3f}" == f"{PAIRS[recipe].params_b:.3f}"
    else:
        assert parameters(recipe) / 1e9 == pytest.approx(MORE_PAIRS[recipe].params_b, rel=0.1)


def test_the_pairs_are_those_of_the_recipes() -> None:
    assert len(PAIRS) == 12
    assert set(CHOSEN) < set(ALL_PAIRS)
    names = {one.recipe: (one.sft.rpartition("/")[2], one.aligned.rpartition("/")[2]) for one in recipes()}
    assert names == {name: (pair.sft, pair.aligned) for name, pair in ALL_PAIRS.items()}
    assert {pair.model.kind for pair in MORE_PAIRS.values()} == set(CONFIGS)


@pytest.mark.parametrize(
    "recipe",
    [
        "zephyr-7b-alpha",
        "starling-lm-7b-alpha",
        "llama3-iterative-dpo",
        "tulu-2-dpo-7b",
        "tulu-2-dpo-13b",
        "tulu-2-dpo-70b",
    ],
)
def test_names_and_shapes_are_those_of_transformers(recipe: str) -> None:
    """The test takes one recipe for each config that is not custom code, and compares the order too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = config(recipe)
    made = transformers.AutoConfig.for_model(**{k: v for k, v in settings.items() if k != "torch_dtype"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert [type(model).__name__] == settings["architectures"]
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(state.items()) == list(shapes(recipe).items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", MORE_PAIRS)
def test_further_names_and_shapes_are_those_of_transformers(recipe: str) -> None:
    """transformers 5 fuses the experts in memory, so of an MoE's experts only the number of elements is compared."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = config(recipe)
    made = transformers.AutoConfig.for_model(**{k: v for k, v in settings.items() if k != "torch_dtype"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert [type(model).__name__] == settings["architectures"]
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings["tie_word_embeddings"]:
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    plain = [[item for item in each.items() if ".experts." not in item[0]] for each in (state, shapes(recipe))]
    assert plain[0] == plain[1]
    assert sum(map(math.prod, state.values())) == parameters(recipe)


def test_every_config_is_compared_or_custom_code() -> None:
    compared = {PAIRS[recipe].model for recipe in ("zephyr-7b-alpha", "starling-lm-7b-alpha", "llama3-iterative-dpo")}
    compared |= {PAIRS[f"tulu-2-dpo-{size}"].model for size in ("7b", "13b", "70b")}
    assert {pair.model for pair in PAIRS.values() if pair.model.kind != "internlm2"} == compared


def plan(sft: Path, aligned: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the plan's object, and stderr."""
    code = main(["--sft", str(sft), "--aligned", str(aligned), "--alpha", "0.3", "--plan", "--json"])
    ran = capsys.readouterr()
    return code, json.loads(ran.out or "{}"), ran.err


# One pair of each architecture is planned in every run, but for OLMoE with its thousands of tensors.
EACH_KIND = ["olmo-2-7b-dpo", "olmo-3-7b-dpo", "gemma-2-9b-simpo", "eurus-2-7b-prime"]
PLANNED = [
    *PAIRS,
    *(name if name in EACH_KIND else pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_PAIRS),
]


@pytest.mark.parametrize("recipe", PLANNED)
def test_plan(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sft, aligned = build(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    huge = SimpleNamespace(total=1 << 50, used=0, free=1 << 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: huge)
    code, planned, stderr = plan(sft, aligned, capsys)
    assert code == 0, stderr
    assert planned["problems"] == []
    steps = {step["name"]: step for step in planned["steps"]}
    assert {name: tuple(step["shape"]) for name, step in steps.items()} == shapes(recipe)
    assert {step["action"] for step in steps.values()} == {"extrapolate"}
    dtype = ALIGNED_DTYPES.get(recipe, "BF16")
    assert {step["dtype"] for step in steps.values()} == {dtype}
    weights = {"BF16": 2, "F32": 4}[dtype] * parameters(recipe)
    assert planned["bytes_read"] == 2 * parameters(recipe) + weights
    assert weights < planned["bytes_written"] < weights + GIGABYTE // 1000
    # An entry is a name, or a name and a reason.
    dropped = {entry if isinstance(entry, str) else entry[0] for entry in planned["dropped"]}
    assert dropped <= set(buffers(recipe))
    assert code_files(recipe) <= set(planned["carried"])
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(planned["carried"])
    assert not [name for name in planned["carried"] if name.endswith((".bin", ".safetensors", ".md", ".index.json"))]
    assert [os.path.basename(out) for out in planned["outputs"]] == [f"{aligned.name}-expo-0.3"]


@pytest.mark.parametrize("recipe", PAIRS)
def test_the_folders_are_hollow_and_have_their_files(recipe: str, tmp_path: Path) -> None:
    pair = PAIRS[recipe]
    for folder, files in zip(build(recipe, tmp_path), (pair.sft_files, pair.aligned_files), strict=True):
        for kind, number in files:
            weights = [path for path in folder.glob(f"*model*.{kind}") if path.is_file()]
            assert len(weights) == number
            assert sum(path.stat().st_size for path in weights) > 2 * parameters(recipe)
        assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < GIGABYTE // 100
        assert code_files(recipe) == {path.name for path in folder.glob("*.py")}


def test_torch_reads_the_bin_files(tmp_path: Path) -> None:
    """The tensors have no memory, because some systems refuse a writable mapping of 10 GB."""
    torch = pytest.importorskip("torch")
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    sft, _ = build("tulu-2-dpo-7b", tmp_path)
    state = {}
    for path in sorted(sft.glob("pytorch_model-*.bin")):
        with fake.FakeTensorMode():
            state |= torch.load(path, weights_only=True)
    expected = shapes("tulu-2-dpo-7b") | buffers("tulu-2-dpo-7b")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    odd = {name for name, tensor in state.items() if tensor.dtype != torch.bfloat16}
    assert odd == set(buffers("tulu-2-dpo-7b"))
    assert {state[name].dtype for name in odd} == {torch.float32}


def test_a_bin_file_reads_as_zeros(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        path = sparse_bin(tmp_path / name, {"a": ("BF16", (300, 7)), "b": ("F32", (5,))})
        state = torch.load(path, weights_only=True)
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "a": (torch.bfloat16, (300, 7)),
            "b": (torch.float32, (5,)),
        }
        assert not any(value.any() for value in state.values())
        assert hasattr(state, "_metadata") == (name == "pytorch_model.bin")


@pytest.mark.alone
@pytest.mark.exhaustive
def test_a_whole_7b_pair_in_little_memory(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < FREE:
        pytest.skip(f"{tmp_path} has {free / GIGABYTE:.1f} GB free; the merged model needs {FREE / GIGABYTE:.0f}")
    sft, aligned = build("zephyr-7b-alpha", tmp_path)
    out = tmp_path / "merged"
    command = [sys.executable, "-m", "expo.fast", "--sft", str(sft), "--aligned", str(aligned)]
    command += ["--alpha", "0.3", "--out", str(out), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *command],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert written > 2 * parameters("zephyr-7b-alpha")
        assert int(done.stdout) < PEAK, f"peak of {int(done.stdout)} bytes"
        assert json.loads((out / "config.json").read_text()) == config("zephyr-7b-alpha")
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f".{out.name}.expo-staging"), ignore_errors=True)
