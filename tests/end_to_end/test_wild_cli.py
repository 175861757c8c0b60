"""The command line with hub ids, recipes, .bin files and adapters: merges and plans of all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoint_files import random_tensors, read_folder, safetensors_bytes, write_folder
from hub_server import Hub, files_of, serve

import expo
from expo.fast import main

ROOT = Path(__file__).parents[2]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
SFT: Shapes = {
    "embed.weight": ("BF16", (10, 4)),
    "up.weight": ("BF16", (6, 5)),
    "old": ("F32", (3,)),
    "n": ("I64", (3,)),
}
ALIGNED: Shapes = {"embed.weight": ("BF16", (12, 4)), "up.weight": ("BF16", (6, 5)), "n": ("I64", (3,))}
OPTIONS = ("--on-mismatch", "rows", "--on-unpaired", "aligned")


class Ran(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run the command line in this process."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as stop:
        code = int(stop.code or 0)
    return Ran(code, *capsys.readouterr())


def as_bin(folder: Path) -> Path:
    """Replace a folder's .safetensors file by a .bin file, and return the folder."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def adapter(folder: Path, form: str = "safetensors") -> Path:
    """Write a LoRA adapter of rank 2 on up.weight."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes: Shapes = {
        "base_model.model.up.lora_A.weight": ("F32", (2, 5)), "base_model.model.up.lora_B.weight": ("F32", (6, 2)),
    }  # fmt: skip
    path = folder / "adapter_model.safetensors"
    path.write_bytes(safetensors_bytes(random_tensors(shapes, 5), {"format": "pt"}))
    if form == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a pair of .bin files whose numbers of rows, names, and tokens differ."""
    folder = tmp_path_factory.mktemp("pair")
    sft = as_bin(write_folder(folder / "sft", random_tensors(SFT, 1)))
    aligned = as_bin(write_folder(folder / "aligned", random_tensors(ALIGNED, 2), config={"dtype": "bfloat16"}))
    for place, tokens in ((sft, ["a", "b"]), (aligned, ["a", "c"])):
        text = json.dumps({"model": {"vocab": {token: i for i, token in enumerate(tokens)}}})
        (place / "tokenizer.json").write_text(text)
    return sft, aligned


TOKENS = (
    "the tokenizers differ in 1 token id (1 is 'b' in sft and 'c' in aligned): rows of the embeddings are extrapolated "
    "by id"
)
PLAN = f"""\
extrapolate  embed.weight[0:10]   BF16 [10, 4] to F16     alpha 0.3, sft has BF16 [10, 4]  80 bytes
copy         embed.weight[10:12]  BF16 [2, 4] to F16      sft has BF16 [10, 4]  16 bytes
extrapolate  up.weight            BF16 [6, 5] to F16      alpha 0.3  60 bytes
copy         n                    I64 [3]                 I64 is not a floating-point dtype  24 bytes
drop         old                  only in sft
rewrite      config.json
carry        tokenizer.json
reads 320 bytes, writes 4.3 kB; FREE are free
memory about MEMORY; engine ENGINE
note: {TOKENS}
-> OUT
"""


def test_a_plan_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    inputs = ("--sft", pair[0], "--aligned", pair[1], "--alpha", 0.3, "--out", out, *OPTIONS, "--dtype", "fp16")
    ran = run(capsys, *inputs, "--plan")
    text = re.sub(r"[\d.]+ \wB are free", "FREE are free", ran.out.replace(str(out), "OUT"))
    text = re.sub(r"about .* MB; engine .*", "about MEMORY; engine ENGINE", text)
    assert (ran.code, text, ran.err) == (0, PLAN, "")
    assert os.listdir(tmp_path) == []


def test_a_plan_as_json_is_what_the_merge_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "{alpha}"
    inputs = ("--sft", pair[0], "--aligned", pair[1], "--alpha", 0.3, 1, "--out", out, *OPTIONS, "--dtype", "fp16")
    inputs = (*inputs, "--max-shard-size", 100, "--json")
    ran = run(capsys, *inputs, "--plan")
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    assert [(step["name"], step["rows"], step["shape"], step["dtype"], step["bytes"]) for step in plan["steps"]] == [
        ("embed.weight", [0, 10], [10, 4], "F16", 80), ("embed.weight", [10, 12], [2, 4], "F16", 16),
        ("up.weight", None, [6, 5], "F16", 60), ("n", None, [3], "I64", 24),
    ]  # fmt: skip
    files = ["model-00001-of-00002.safetensors"] * 2 + ["model-00002-of-00002.safetensors"] * 2
    assert [step["file"] for step in plan["steps"]] == files
    assert (plan["dropped"], plan["rewritten"], plan["carried"]) == (
        {"old": "only in sft"},
        ["config.json"],
        ["tokenizer.json"],
    )
    assert (plan["notes"], plan["problems"]) == ([TOKENS], [])
    ran = run(capsys, *inputs)
    done = json.loads(ran.out)
    assert ran.code == 0
    assert f"expo: warning: {TOKENS}\n" in ran.err
    assert [output["path"] for output in done["outputs"]] == plan["outputs"]
    for name in ("bytes_read", "bytes_written"):
        assert done[name] == plan[name]
    assert done["dropped"] == [["old", "only in sft"]]
    assert done["noted"] == [["embed.weight[0:10]", "sft has BF16 [10, 4]"]]
    assert done["copied"] == [
        ["embed.weight[10:12]", "sft has BF16 [10, 4]"], ["n", "I64 is not a floating-point dtype"]
    ]  # fmt: skip
    assert done["warnings"][0] == TOKENS
    assert json.loads((tmp_path / "1" / "config.json").read_text()) == {"dtype": "float16"}
    assert sorted(os.listdir(tmp_path / "1")) == [
        "README.md", "config.json", *sorted(set(files)), "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip


def test_the_command_in_the_card_makes_the_same_model_where_the_inputs_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    rule = 0.123456789012345
    inputs = ("--sft", pair[0], "--aligned", pair[1], "--alpha", 1 / 3, *OPTIONS, "--alpha-for", f"up={rule!r}")
    assert run(capsys, *inputs, "--out", tmp_path / "out", "--dtype", "fp32", "--max-shard-size", "1kB").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("$ python -m expo.fast "))
    assert f"up={rule!r}" in command
    assert pair[0].parent == pair[1].parent
    monkeypatch.chdir(pair[0].parent)
    assert run(capsys, *shlex.split(command)[4:], "--out", tmp_path / "again").code == 0
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "out")
    assert (tmp_path / "again" / "README.md").read_text() == card


# This program runs several commands or streams in one process, and prints the exit code, the output and the imports of
# each.
DRIVER = """
import contextlib, io, json, sys
HEAVY = {"numpy", "torch", "transformers", "safetensors", "triton", "ml_dtypes", "huggingface_hub", "yaml", "peft"}
results = []
for arguments in json.loads(sys.argv[1]):
    out, err, before = io.StringIO(), io.StringIO(), HEAVY & set(sys.modules)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        import expo
        from expo.fast import main
        try:
            if arguments[0] == "stream":
                tensors = expo.stream(**json.loads(arguments[1]), framework="numpy")
                code = print(json.dumps({name: tensor.tobytes().hex() for name, tensor in tensors})) or 0
            else:
                code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        except expo.ExpoError as error:
            code = print(f"{type(error).__name__}: {error}", file=sys.stderr) or error.exit_code
    results.append([code, out.getvalue(), err.getvalue(), sorted(HEAVY & set(sys.modules) - before)])
print(json.dumps(results))
"""


class Driven(NamedTuple):
    """The exit code and the output of a command, and the large libraries that it was the first to import."""

    code: int
    out: str
    err: str
    imported: list[str]


def drive(folder: Path, *commands: Sequence[object], **variables: str) -> list[Driven]:
    """Run the commands one after another in one new process."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), **variables}
    text = json.dumps([list(map(str, each)) for each in commands])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER, text],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [Driven(*each) for each in json.loads(done.stdout)]


def test_what_plans_and_merges_import(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base = write_folder(tmp_path / "base", random_tensors({"up.weight": ("BF16", (6, 5))}, 1))
    lora = ("--sft", base, "--aligned", adapter(tmp_path / "lora"), "--alpha", 0.3, "--out", tmp_path / "from-lora")
    pickled = ("--sft", base, "--aligned", adapter(tmp_path / "lora.bin", "bin"), "--alpha", 0.3)
    bins = ("--sft", pair[0], "--aligned", pair[1], "--alpha", 0.3, *OPTIONS, "--out", tmp_path / "from-bin")
    ran = drive(
        tmp_path, ["--list-recipes"], [*bins, "--plan"], [*bins, "--plan", "--dtype", "fp16", "--json"], bins,
        [*lora, "--plan", "--json"], [*pickled, "--plan"], lora, [*bins, "--dtype", "fp16", "--overwrite"],
    )  # fmt: skip
    assert [each.code for each in ran] == [0] * len(ran)
    assert [each.imported for each in ran[:4]] == [[], [], [], ["yaml"]]  # the model card needs yaml
    assert {name for each in ran for name in each.imported} == {"ml_dtypes", "numpy", "yaml"}
    step = json.loads(ran[4].out)["steps"][0]
    assert (step["name"], step["action"], step["reason"]) == ("up.weight", "extrapolate", "adapter of rank 2")
    assert "adapter of rank 2" in ran[5].out


class Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("role", ["sft", "aligned"])
@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_a_hostile_pickle_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], role: str, zipped: bool
) -> None:
    sentinel, bad = tmp_path / "ran", tmp_path / "bad"
    bad.mkdir()
    state = {"w": torch.ones(2), "x": Runs(f"touch {sentinel}")}
    torch.save(state, bad / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    places = {"sft": pair[0], "aligned": pair[1], role: bad}
    for more in (["--plan"], ["--out", tmp_path / "out"]):
        ran = run(capsys, "--sft", places["sft"], "--aligned", places["aligned"], "--alpha", 0.3, *more)
        assert (ran.code, ran.out) == (3, "")
        assert ran.err.endswith(
            f"expo: error: {bad}/pytorch_model.bin: it refers to posix.system, which is not plain weights; nothing in "
            "it was run; save model.state_dict() alone, or load it with transformers and save it with "
            "save_pretrained()\n"
        )
    with pytest.raises(expo.CheckpointError, match="nothing in it was run"):
        expo.stream(places["sft"], places["aligned"], 0.3)
    assert os.listdir(tmp_path) == ["bad"]


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "--list-recipes")
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 34
    ran = run(capsys, "--list-recipes", "--json")
    assert (ran.code, ran.err) == (0, "")
    entries = json.loads(ran.out)
    assert len(entries) == 27
    assert {line["recipe"]: line["alpha"] for line in entries}["zephyr-7b-beta"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sft, --aligned and --alpha must be given, or --recipe gives all three"),
        (["--alpha", "0.3"], "--sft and --aligned must be given, or --recipe gives all three"),
        (["--aligned", "x", "--alpha", "0.3"], "--sft must be given, or --recipe gives all three"),
        (["--recipe", "zephyr-7b"], "no recipe 'zephyr-7b': did you mean zephyr-7b-beta or zephyr-7b-alpha or"),
        (["--recipe", "gpt2", "--plan"], "no recipe 'gpt2': python -m expo.fast --list-recipes shows all 27"),
        (
            ["--recipe", "tulu-2-dpo-7b", "--max-shard-size", "x"],
            "--max-shard-size takes bytes, or a size such as 5GB or",
        ),
        (["--recipe", "tulu-2-dpo-7b", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8' (choose from "),
        (["--recipe", "tulu-2-dpo-7b", "--alpha-for", "x=much"], "--alpha-for takes REGEX=FLOAT, got 'x=much'"),
        (["--recipe", "tulu-2-dpo-7b", "--out", ""], "--out is empty: name a folder or a file"),
        (["--recipe", "tulu-2-dpo-7b", "--alpha", "0.1", "0.2", "--out", "x"], "2 alphas need an output each"),
    ],
    ids=str,
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """The command reports bad usage before it asks a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expo.inputs.hub.fetch", lambda *_: pytest.fail("it was fetched before the options were read"))
        ran = run(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert f"error: {message}" in ran.err.splitlines()[-1]


# --- the hub ----------------------------------------------------------------------------------------------------------

PLAIN: Shapes = {"embed.weight": ("BF16", (10, 4)), "up.weight": ("BF16", (6, 5))}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as running:
        yield running


class World(NamedTuple):
    """The folder of the commands, the commits of the hub's repositories, and the result of each command."""

    folder: Path
    commits: dict[str, str]
    ran: dict[str, Driven]


MODEL = ["--sft", "org/sft", "--aligned", "org/Model-7B-v0.2", "--alpha"]
RECIPE = ["--recipe", "zephyr-7b-beta"]
HERE = ["--aligned", "here/aligned", "--alpha", "0.3"]
COMMANDS = {
    "plan": [*MODEL, "0.3", "--plan", "--json"],
    "ids": [*MODEL, "0.3"],
    "several": [*MODEL, "0.1", "0.2"],
    "bin": ["--sft", "org/sft@v1", "--aligned", "org/pickled@main", "--alpha", "0.5", "--digest", "--verify"],
    "mixed": ["--sft", "here/sft", "--aligned", "org/Model-7B-v0.2", "--alpha", "0.25"],
    "adapter": ["--sft", "org/sft", "--aligned", "org/lora", "--alpha", "0.3"],
    "recipe": RECIPE,
    "alpha": [*RECIPE, "--alpha", "0.7", "--json"],
    "aligned": [*RECIPE, "--aligned", "here/aligned", "--out", "mine"],
    "stream": ["stream", json.dumps({"sft": "org/sft@v1", "aligned": "org/pickled", "alpha": 0.5})],
    "stream of a recipe": ["stream", json.dumps({"recipe": "zephyr-7b-beta", "on_mismatch": "rows"})],
    "stream of nothing": ["stream", json.dumps({"recipe": "zephyr-7b-alpha"})],
    "missing": ["--sft", "no/such", "--aligned", "org/Model-7B-v0.2", "--alpha", "0.3"],
    "mistyped": ["--sft", "here/stf", *HERE, "--plan"],
    "deep": ["--sft", "here/a/b", *HERE],
}
AGAIN = ("ids", "bin", "recipe", "missing")


@pytest.fixture(scope="module")
def world(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("sft", 1), ("aligned", 2)):
        write_folder(folder / "here" / name, random_tensors(PLAIN, seed))
    (folder / "here" / "aligned" / "README.md").write_text("---\nlicense: mit\n---\n# theirs\n")
    sft, aligned = (files_of(folder / "here" / name) for name in ("sft", "aligned"))
    pickled = files_of(as_bin(write_folder(folder / "pickled", random_tensors(PLAIN, 2))))
    lora = files_of(adapter(folder / "lora"))
    repos = {
        "org/sft": sft, "org/Model-7B-v0.2": aligned, "org/pickled": pickled, "org/lora": lora,
        "HuggingFaceH4/zephyr-7b-beta": aligned, "HuggingFaceH4/mistral-7b-sft-beta": sft,
    }  # fmt: skip
    commits = {name: server.add(name, files) for name, files in repos.items()}
    server.repos["org/sft"].refs["v1"] = commits["org/sft"]
    variables = {
        "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    ran = dict(zip(COMMANDS, drive(folder, *map(quietly, COMMANDS.values()), **variables), strict=True))
    offline = [[*COMMANDS[name], "--out", f"offline-{name}", "--quiet"] for name in AGAIN]
    again = drive(folder, *offline, **variables, HF_HUB_OFFLINE="1")
    ran |= {f"offline {name}": each for name, each in zip(AGAIN, again, strict=True)}
    return World(folder, commits, ran)


def quietly(command: list[str]) -> list[str]:
    return command if command[0] == "stream" else [*command, "--quiet"]


def made(world: World, name: str) -> dict[str, Any]:
    return dict(read_folder(world.folder / name))


def test_hub_ids_give_what_the_folders_give(world: World, tmp_path: Path) -> None:
    for name in ("ids", "bin", "mixed", "several", "adapter", "recipe", "aligned"):
        assert world.ran[name].code == 0, world.ran[name]
        assert world.ran[name].out == ""
    here = world.folder / "here" / "sft", world.folder / "here" / "aligned"
    outs = {
        "Model-7B-v0.2-expo-0.3": 0.3, "Model-7B-v0.2-expo-0.25": 0.25, "Model-7B-v0.2-expo-0.1": 0.1,
        "Model-7B-v0.2-expo-0.2": 0.2, "pickled-expo-0.5": 0.5, "zephyr-7b-beta-expo-0.1": 0.1,
        "zephyr-7b-beta-expo-0.7": 0.7, "mine": 0.1,
    }  # fmt: skip
    for out, alpha in outs.items():
        expo.merge(*here, alpha, tmp_path / out)
        assert made(world, out) == read_folder(tmp_path / out)
    expo.merge(here[0], world.folder / "lora", 0.3, tmp_path / "lora")
    assert made(world, "lora-expo-0.3") == read_folder(tmp_path / "lora")
    folders = {path.name for path in world.folder.iterdir() if path.is_dir()}
    offline = {f"offline-{name}" for name in AGAIN if name != "missing"}
    assert folders == {*outs, *offline, "lora-expo-0.3", "here", "hf", "lora", "pickled"}


def test_streams_of_hub_ids(world: World, server: Hub) -> None:
    for name, out in (("stream", "pickled-expo-0.5"), ("stream of a recipe", "zephyr-7b-beta-expo-0.1")):
        ran = world.ran[name]
        assert (ran.code, ran.err) == (0, "")
        tensors = {key: data.hex() for key, (_, _, data) in made(world, out).items()}
        assert json.loads(ran.out) == tensors
    ran, name = world.ran["stream of nothing"], "HuggingFaceH4/zephyr-7b-alpha"
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(
        f"CheckpointError: {name}: no such file or folder; as a hub id: {name}@main: no such repository on "
        f"{server.endpoint}, "
    )


def test_the_card_has_ids_and_commits(world: World) -> None:
    card = (world.folder / "Model-7B-v0.2-expo-0.3" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- org/Model-7B-v0.2\n- org/sft\nbase_model_relation: merge\n")
    assert "license: mit" in card
    for role, name in (("sft", "org/sft"), ("aligned", "org/Model-7B-v0.2")):
        commit = world.commits[name]
        assert f"- {role}: [`{name}`](https://huggingface.co/{name}/tree/{commit}), commit `{commit}`\n" in card
    assert "$ python -m expo.fast --sft org/sft --aligned org/Model-7B-v0.2 --alpha 0.3\n" in card
    card = (world.folder / "Model-7B-v0.2-expo-0.25" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- org/Model-7B-v0.2\n- sft\n")
    assert "\n- sft: `sft`\n" in card
    card = (world.folder / "zephyr-7b-beta-expo-0.7" / "README.md").read_text()
    assert "\n- HuggingFaceH4/zephyr-7b-beta\n- HuggingFaceH4/mistral-7b-sft-beta\n" in card
    card = (world.folder / "lora-expo-0.3" / "README.md").read_text()
    assert f"- aligned: [`org/lora`](https://huggingface.co/org/lora/tree/{world.commits['org/lora']})" in card


def test_plans_and_results_of_hub_ids(world: World) -> None:
    assert world.ran["plan"].code == 0
    assert json.loads(world.ran["plan"].out)["outputs"] == ["Model-7B-v0.2-expo-0.3"]
    assert world.ran["plan"].imported == ["huggingface_hub", "yaml"]
    done = json.loads(world.ran["alpha"].out)
    assert [(output["alpha"], output["path"]) for output in done["outputs"]] == [(0.7, "zephyr-7b-beta-expo-0.7")]


def test_offline_the_cache_does(world: World) -> None:
    for name in AGAIN[:-1]:
        ran = world.ran[f"offline {name}"]
        assert (ran.code, ran.err) == (world.ran[name].code, world.ran[name].err)
    assert made(world, "offline-ids") == made(world, "Model-7B-v0.2-expo-0.3")
    assert made(world, "offline-recipe") == made(world, "zephyr-7b-beta-expo-0.1")
    ran = world.ran["offline missing"]
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        "expo: error: no/such: no such file or folder; as a hub id: no/such@main: huggingface_hub is offline "
        f"(HF_HUB_OFFLINE is set), and the cache {world.folder}/hf/hub has nothing of it; unset HF_HUB_OFFLINE to "
        "download it\n"
    )


def test_a_mistyped_folder(world: World, server: Hub) -> None:
    for name, text in (("missing", "no/such"), ("mistyped", "here/stf")):
        ran = world.ran[name]
        assert (ran.code, ran.out) == (3, "")
        assert ran.err == (
            f"expo: error: {text}: no such file or folder; as a hub id: {text}@main: no such repository on "
            f"{server.endpoint}, or a private one, and no token is set; check the name, or log in with "
            "`hf auth login`, or set HF_TOKEN\n"
        )
    assert (world.ran["deep"].code, world.ran["deep"].err) == (3, "expo: error: here/a/b: no such file or folder\n")


def test_a_snapshot_in_the_cache_is_known_by_its_repository(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = world.folder / "hf" / "hub"
    sft, aligned = (
        cache / f"models--org--{name}" / "snapshots" / world.commits[f"org/{name}"] for name in ("sft", "Model-7B-v0.2")
    )
    monkeypatch.chdir(tmp_path)
    merged = expo.merge(sft, aligned, 0.3)
    assert merged.outputs[0].path == "Model-7B-v0.2-expo-0.3"
    assert made(world, "Model-7B-v0.2-expo-0.3") == read_folder(tmp_path / "Model-7B-v0.2-expo-0.3")
    expo.merge(sft, aligned / "model.safetensors", 0.3)
    assert sorted(os.listdir(tmp_path)) == ["Model-7B-v0.2-expo-0.3", "Model-7B-v0.2-expo-0.3.safetensors"]
    assert world.commits["org/sft"] in (tmp_path / "Model-7B-v0.2-expo-0.3" / "README.md").read_text()
