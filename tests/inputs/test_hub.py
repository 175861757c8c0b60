"""Downloads from a hub: the files that are fetched, and the messages of failures. The client is the real library."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_files import random_tensors, read_folder, write_folder
from hub_client import Client
from hub_server import TOKEN, Hub, files_of

from expo.checkpoints.checkpoint import open_checkpoint
from expo.errors import CheckpointError
from expo.inputs import hub
from expo.inputs.hub_ids import HubId, Snapshot, snapshot_origin

SHAPES = {"embed.weight": ("BF16", (64, 32)), "layer.weight": ("BF16", (32, 32)), "norm.weight": ("F32", (32,))}


def model(folder: Path, shards: int = 0) -> dict[str, bytes]:
    """Return a repository such as trainers upload: the weights, the files that belong to them, and many others."""
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    write_folder(folder, random_tensors(SHAPES, 1), shards, config)
    extra = (
        ".gitattributes", "README.md", "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "vocab.json", "unused.py", "run.sh", "training_args.bin", "trainer_state.json",
        "model-q4.gguf", "tf_model.h5", "flax_model.msgpack", "original/consolidated.00.pth", "original/params.json",
        "checkpoint-10/optimizer.pt", "runs/events.out.tfevents", "consolidated.safetensors",
    )  # fmt: skip
    code = {
        "modeling_own.py": b"from .blocks.attention import Attention\n",
        "blocks/__init__.py": b"# blocks",
        "blocks/attention.py": b"WORDS = 'own.words'\n",
        "own.words": b"a b c",
    }
    return {**files_of(folder), **{name: json.dumps({"this": name}).encode() for name in extra}, **code}


ABOUT = {"config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
CODE = {"modeling_own.py", "blocks/__init__.py", "blocks/attention.py", "own.words"}
CARRIED = ABOUT | CODE | {"LICENSE", "README.md", "generation_config.json", "vocab.json"}


CHOICES: list[tuple[Sequence[str], str]] = [
    (("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"), "model.safetensors"),
    (("model.safetensors.index.json", "pytorch_model.bin"), "model.safetensors.index.json"),
    (("pytorch_model.bin", "pytorch_model.bin.index.json"), "pytorch_model.bin"),
    (("pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.bin"), "pytorch_model.bin.index.json"),
    (("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"), "adapter_model.safetensors"),
    (("adapter_config.json", "adapter_model.bin"), "adapter_model.bin"),
]


@pytest.mark.parametrize(("names", "chosen"), CHOICES)
def test_the_form_of_the_weights(names: Sequence[str], chosen: str) -> None:
    files = hub.choose_files(HubId("org/name", None), names, weights_only=True)
    is_index = chosen.endswith(".json")
    assert (files.weights, files.index_file) == (([], chosen) if is_index else ([chosen], None))
    adapter = ["adapter_config.json"] if "adapter_config.json" in names else []
    assert files.others == adapter + [chosen] * is_index


@pytest.mark.parametrize("fast", [True, False])
def test_the_tokens_of_sft_are_those_of_one_form(fast: bool) -> None:
    tokens = ["merges.txt", "tokenizer.model", "vocab.json"]
    names = ["model.safetensors", *tokens, *(["tokenizer.json"] if fast else [])]
    others = hub.choose_files(HubId("org/name", None), names, weights_only=True).others
    assert sorted(others) == (["tokenizer.json"] if fast else tokens)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf"],
            "has m-Q4_K_M.gguf, m-Q8_0.gguf (GGUF); give the repository",
        ),
        (["original/consolidated.00.pth"], "the repository has original/consolidated.00.pth; give the repository"),
        ([f"unet/{i}.safetensors" for i in range(7)], "unet/4.safetensors and 2 more"),
        (["adapter_model.safetensors"], "the repository has adapter_model.safetensors"),
        (["README.md"], "the repository has README.md"),
        ([], "the repository has no files at all"),
    ],
)
def test_a_repository_without_weights(names: list[str], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hub.choose_files(HubId("org/name", "v1"), names)
    assert said in str(caught.value)
    assert str(caught.value).startswith(
        "org/name@v1: no weights that can be read. The file has to be model.safetensors, "
    )


def test_a_sharded_repository(server: Hub, client: Client, tmp_path: Path) -> None:
    files = model(tmp_path / "model", shards=3)
    shards = {name for name in files if re.fullmatch(r"model-.*-of-.*\.safetensors", name)}
    stray = {
        "pytorch_model.bin": b"x",
        "model-00004-of-00003.safetensors": b"x",
        "additional_chat_templates/odd [1]*.jinja": b"y",
    }
    commit = server.add("org/name", {**files, **stray})
    both = {*shards, "model.safetensors.index.json"}
    (sft,) = client(("org/name", True, True))
    assert set(server.asked()) == ABOUT | both
    assert sft == (str(tmp_path / f"home/hf/hub/models--org--name/snapshots/{commit}"), "org/name", commit)
    assert client.stderr == ""
    server.log.clear()
    aligned, again, named = client("org/name", "org/name", f"org/name@{commit}")
    assert set(server.asked()) == CARRIED - ABOUT | {"additional_chat_templates/odd [1]*.jinja"}
    assert sft == aligned == again == named
    assert snapshot_origin(aligned.folder) == ("org/name", commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        checkpoint = open_checkpoint(aligned.folder)
    assert set(checkpoint.shards) == shards
    assert set(checkpoint.files) == CARRIED | {"additional_chat_templates/odd [1]*.jinja"}
    assert checkpoint.strays == {}
    checkpoint.close()
    assert read_folder(Path(aligned.folder)) == random_tensors(SHAPES, 1)


def test_one_file_of_either_format(server: Hub, client: Client, tmp_path: Path) -> None:
    files = model(tmp_path / "model")
    server.add("org/both", {**files, "pytorch_model.bin": b"x"})
    pickled = {name: data for name, data in files.items() if name != "model.safetensors"}
    server.add("org/pickled", {**pickled, "pytorch_model.bin": b"x"})
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}).encode()
    parts = {f"pytorch_model-{i}.bin": b"%d" % i for i in (1, 2, 3)}
    server.add("org/parts", {**pickled, **parts, "pytorch_model.bin.index.json": index})
    adapter = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md", "tokenizer.json")
    server.add("org/adapter", {name: name.encode() for name in adapter})
    server.add("org/bare", {"model.safetensors": files["model.safetensors"]})
    wanted = {
        "org/both": CARRIED | {"model.safetensors"},
        "org/pickled": CARRIED | {"pytorch_model.bin"},
        "org/parts": CARRIED | {"pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin"},
        "org/adapter": {*adapter} - {"adapter_model.bin"},
        "org/bare": {"model.safetensors"},
    }
    for snapshot, (repo, names) in zip(client(*wanted), wanted.items(), strict=True):
        assert set(files_of(Path(snapshot.folder))) == names, repo
    assert sorted(server.asked()) == sorted(name for names in wanted.values() for name in names)


def test_revisions(server: Hub, client: Client, tmp_path: Path) -> None:
    old = {"model.safetensors": b"old", "config.json": b"{}"}
    first = server.add("org/name", old)
    second = server.repos["org/name"].commit({**old, "model.safetensors": b"new"}, "main", "v2.0", "refs/pr/1")
    revisions = {"": second, "@main": second, "@v2.0": second, "@refs/pr/1": second, f"@{first}": first}
    results = client(*(f"org/name{revision}" for revision in revisions))
    assert [snapshot.commit for snapshot in results] == list(revisions.values())
    assert [Path(snapshot.folder).name for snapshot in results] == list(revisions.values())
    assert [(Path(snapshot.folder) / "model.safetensors").read_bytes() for snapshot in results] == [b"new"] * 4 + [
        b"old"
    ]
    third = server.repos["org/name"].commit({**old, "model.safetensors": b"newer"})
    (moved,) = client("org/name")
    assert moved.commit == third
    server.log.clear()
    offline = client("org/name", "org/name@v2.0", f"org/name@{first}", HF_HUB_OFFLINE="1")
    assert [snapshot.commit for snapshot in offline] == [third, second, first]
    assert server.log == []


def test_what_the_hub_refuses(server: Hub, client: Client) -> None:
    files = {"model.safetensors": b"x", "config.json": b"{}"}
    server.add("org/public", files)
    server.add("org/private", files, private=True)
    server.add("org/gated", files, gated=True)
    at = server.endpoint
    login = "log in with `hf auth login`, or set HF_TOKEN"
    ids = ("org/missing", "org/private@main", "org/gated@main", "org/public@v9")
    missing, private, gated, revision = client(*ids)
    unseen = f"no such repository on {at}, or a private one, and no token is set; check the name, or {login}"
    assert missing == f"org/missing@main: {unseen}"
    assert private == f"org/private@main: {unseen}"
    assert gated == (
        "org/gated@main: the repository is gated, and no token is set; "
        f"accept its conditions at {at}/org/gated and {login}"
    )
    assert revision == (
        "org/public@v9: the repository is there, but no such branch, tag or commit; "
        f"see {at}/org/public/tree/main"
    )  # fmt: skip
    missing, private, gated, _ = client(*ids, HF_TOKEN=TOKEN)
    assert "or a private one, and the token that is set has no access to it; check the name" in missing
    assert isinstance(private, Snapshot)
    assert "is gated, and the token that is set has no access to it; accept its conditions" in gated
    (refused,) = client("org/public", HF_TOKEN="hf_wrong")
    assert refused.startswith(f"org/public@main: {at} refuses the token (HfHubHTTPError: ")
    assert refused.endswith(login)
    stored = client.home / "hf" / "token"
    stored.write_text(TOKEN)
    server.repos["org/private"].commit({**files, "model.safetensors": b"y"})
    (private,) = client("org/private")
    assert (Path(private.folder) / "model.safetensors").read_bytes() == b"y"


def test_a_connection_cut_in_the_middle_of_a_file_goes_on_where_it_was(server: Hub, client: Client) -> None:
    data = os.urandom(1 << 20) * 25
    server.add("org/name", {"config.json": b"{}", "model.safetensors": data})
    server.cut["model.safetensors"] = 15 << 20
    (snapshot,) = client("org/name")
    if isinstance(snapshot, str):  # older versions of the library do not continue a file by themselves
        assert snapshot.startswith(f"org/name@main: no connection to {server.endpoint}, or a broken one (")
        assert snapshot.endswith("run the same command again: complete files are not downloaded again")
        (snapshot,) = client("org/name")
    assert (Path(snapshot.folder) / "model.safetensors").read_bytes() == data
    ranges = [found for verb, path, found in server.log if verb == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [None, f"bytes={10 << 20}-"]  # the library writes 10 MiB at a time


def test_a_hub_that_fails_in_the_middle_and_the_same_command_again(server: Hub, client: Client, tmp_path: Path) -> None:
    files = model(tmp_path / "model", shards=3)
    server.add("org/name", files)
    last = "model-00003-of-00003.safetensors"
    server.status[last] = 503
    (message,) = client("org/name")
    assert message.startswith(f"org/name@main: no connection to {server.endpoint}, or a broken one (HfHubHTTPError: ")
    assert "503" in message
    assert message.endswith("; run the same command again: complete files are not downloaded again")
    (offline,) = client("org/name", HF_HUB_OFFLINE="1")
    assert "has nothing of it" in offline  # the cache records a revision when all of its files are there
    del server.status[last]
    server.log.clear()
    (snapshot,) = client("org/name")
    assert server.asked() == [last]
    open_checkpoint(snapshot.folder).close()


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="the library does not record a commit's files"
)
def test_without_a_network(server: Hub, client: Client, tmp_path: Path) -> None:
    commit = server.add("org/name", model(tmp_path / "model", shards=2))
    server.add("org/other", {"config.json": b"{}", "model.safetensors": b"x"})
    (sft,) = client(("org/name", True, True))
    server.log.clear()
    cached, incomplete, absent = client(("org/name", True, True), "org/name", "org/other", HF_HUB_OFFLINE="1")
    cache = client.home / "hf" / "hub"
    offline, fix = "huggingface_hub is offline (HF_HUB_OFFLINE is set)", "unset HF_HUB_OFFLINE to download it"
    assert cached == sft
    assert re.fullmatch(
        rf"org/name@main: .*, and the cache {cache} lacks .*generation_config.json.*; {fix}", incomplete
    )
    assert absent == f"org/other@main: {offline}, and the cache {cache} has nothing of it; {fix}"
    assert server.log == []
    down = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    cached, incomplete, absent = client(("org/name", True, True), "org/name", f"org/other@{commit}", **down)
    assert cached == sft
    assert re.match(r"org/name@main: no connection to http://127.0.0.1:9, or a broken one \(ConnectE", incomplete)
    assert absent.endswith("has nothing of it; run the same command again: complete files are not downloaded again")
    shard = Path(sft.folder) / "model-00002-of-00002.safetensors"
    shard.unlink()
    (incomplete,) = client(("org/name", True, True), HF_HUB_OFFLINE="1")
    assert f"the cache {cache} lacks {shard.name}; unset" in incomplete


def test_an_index_that_names_what_is_not_there(server: Hub, client: Client) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    server.add("org/torn", {"model.safetensors.index.json": index, "model-1.safetensors": b"x"})
    server.add("org/empty", {"model.safetensors.index.json": b"{}"})
    torn, empty = client("org/torn", "org/empty")
    assert torn.startswith(
        "org/torn@main: model.safetensors.index.json names model-2.safetensors, which the repository"
    )
    assert empty.startswith("org/empty@main: model.safetensors.index.json has no weight_map object")
    assert server.asked() == ["model.safetensors.index.json"] * 2


def test_a_cache_of_ones_own_and_one_that_cannot_be_written(server: Hub, client: Client, tmp_path: Path) -> None:
    server.add("org/name", {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
    (snapshot,) = client("org/name", HF_HUB_CACHE=str(tmp_path / "own"))
    assert Path(snapshot.folder).is_relative_to(tmp_path / "own" / "models--org--name")
    (full,) = client("org/name", FILE_LIMIT=str(1 << 20))
    again = "run the same command again: complete files are not downloaded again"
    cache = client.home / "hf" / "hub"
    assert (
        full
        == f"org/name@main: {cache}: File too large; make room there, or set HF_HOME to another folder, then {again}"
    )
    (tmp_path / "file").touch()
    (blocked,) = client("org/name", HF_HOME=str(tmp_path / "file"))
    assert "Not a directory; set HF_HOME to another folder" in blocked


def test_progress(server: Hub, client: Client, tmp_path: Path) -> None:
    server.add("org/name", model(tmp_path / "model", shards=2))
    client(("org/name", False, True))
    assert client.stderr == ""
    client(("org/name", False, False))  # nothing is left to download but the revision's name
    assert "downloaded" not in client.stderr
    shutil.rmtree(client.home / "hf")
    client(("org/name", False, False))
    assert re.search(r"expo: downloaded 2 weight files, [\d.]+ kB in [\d.]+ s, [\d.]+ [kM]B/s\n", client.stderr)
    client(("org/name", False, True), HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert client.stderr == ""


@pytest.mark.usefixtures("own_signals")
def test_ctrl_c_ends_a_download_at_once(server: Hub, client: Client) -> None:
    server.add("org/name", {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
    server.stall["model.safetensors"] = 1 << 20
    with client.start("org/name") as process:
        assert server.stalled.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=8)  # the library by itself would wait 10 seconds and try again
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    del server.stall["model.safetensors"]
    (snapshot,) = client("org/name")
    assert (Path(snapshot.folder) / "model.safetensors").read_bytes() == bytes(3 << 20)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/name@v1: hub ids need huggingface_hub 0\.34 or later, which"):
        hub.fetch(HubId("org/name", "v1"))
