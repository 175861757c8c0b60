"""Hub ids: which files are fetched, what is recorded, what is said where that cannot be. The client is the real one."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_files import random_tensors, read_folder, write_folder
from hub_client import Client
from hub_server import TOKEN, Hub, files_of, serve

from expo.checkpoints.checkpoint import open_checkpoint
from expo.errors import CheckpointError
from expo.inputs import hub
from expo.inputs.hub_headers import FIRST_REQUEST, stand_in_folder
from expo.inputs.hub_ids import HubId, Snapshot, parse_hub_id, snapshot_origin

SHAPES = {"embed.weight": ("BF16", (64, 32)), "layer.weight": ("BF16", (32, 32)), "norm.weight": ("F32", (32,))}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def client(server: Hub, tmp_path: Path) -> Client:
    return Client(server.endpoint, tmp_path / "home")


def model(folder: Path, shards: int = 0) -> dict[str, bytes]:
    """A repository as trainers leave them: the weights, what belongs to them, and much that does not."""
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


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("meta-llama/Llama-3.1-8B_x@v1.0", "meta-llama/Llama-3.1-8B_x", "v1.0"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        (f"org/name@{SHA}", "org/name", SHA),
        ("org/name@a@b", "org/name", "a@b"),
        ("a/b", "a/b", None),
        (f"{'a' * 96}/{'b' * 96}", f"{'a' * 96}/{'b' * 96}", None),
    ],
)
def test_hub_ids(text: str, repo: str, revision: str | None) -> None:
    assert parse_hub_id(text) == (repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "name@main", "a/b/c", "a/b/c@main", "/a/b", "/name", "./name", "../name", "a/..", "a/../b",
        "~/name", "~user/name", ".hidden/name", "a/.hidden", "a/name.", "-a/name", "a/name-", "a//b", "a/", "/b",
        "a/b@", "@main", "a/b@../c", "a/b@c..d", "a/b@/c", "a/b@c/", "a/b@c//d", "a/b@-c", "a/b@c d", "a/b@c:d",
        "a/b@c*", "a/b@c\n", "a b/c", "a/b\n", "a/b--c", "a--b/c", "ä/b", "a/b.git", "a/model.safetensors",
        "a/pytorch_model.bin",
        f"{'a' * 97}/b", f"a/{'b' * 97}", "a\\b/c", "https://huggingface.co/a/b", "a/b?c", "a/b#c", "a/[b]",
    ],
)  # fmt: skip
def test_what_is_no_hub_id(text: str) -> None:
    assert parse_hub_id(text) is None


def test_the_label_names_repository_and_revision() -> None:
    assert str(HubId("org/name", None)) == "org/name@main"
    assert str(HubId("org/name", "v1")) == "org/name@v1"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/c/hub/models--org--name/snapshots/{SHA}", ("org/name", SHA)),
        (f"/c/hub/models--org--name/snapshots/{SHA}/", ("org/name", SHA)),
        (f"/c/hub/models--org--name/snapshots/{SHA}/sub/model.safetensors", ("org/name", SHA)),
        (f"/c/hub/models--gpt2/snapshots/{SHA}", ("gpt2", SHA)),
        (f"/c/hub/datasets--org--name/snapshots/{SHA}", None),
        (f"/c/hub/models--org--name/blobs/{SHA}", None),
        ("/c/hub/models--org--name/snapshots", None),
        (f"/c/hub/models--org--name/snapshots/{SHA}0", None),
        ("/c/models/name", None),
        ("models--org--name", None),
    ],
)
def test_the_origin_of_a_path(path: str, found: tuple[str, str] | None) -> None:
    assert snapshot_origin(path) == found


def test_the_origin_of_relative_paths_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--org--name" / "blobs" / "b"
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/b")
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot.parent)
    for path in (SHA, f"{SHA}/model.safetensors", tmp_path / "link", f"./{SHA}/../{SHA}"):
        assert snapshot_origin(path) == ("org/name", SHA)


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
    assert "or a private one, and the token that is set does not open it; check the name" in missing
    assert isinstance(private, Snapshot)
    assert "is gated, and the token that is set does not open it; accept its conditions" in gated
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
    if isinstance(snapshot, str):  # older versions of the client leave it to the next command
        assert snapshot.startswith(f"org/name@main: no connection to {server.endpoint}, or a broken one (")
        assert snapshot.endswith("run the same command again: what is complete is not downloaded again")
        (snapshot,) = client("org/name")
    assert (Path(snapshot.folder) / "model.safetensors").read_bytes() == data
    ranges = [found for verb, path, found in server.log if verb == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [None, f"bytes={10 << 20}-"]  # the client writes in pieces of 10 MiB


def test_a_hub_that_fails_in_the_middle_and_the_same_command_again(server: Hub, client: Client, tmp_path: Path) -> None:
    files = model(tmp_path / "model", shards=3)
    server.add("org/name", files)
    last = "model-00003-of-00003.safetensors"
    server.status[last] = 503
    (message,) = client("org/name")
    assert message.startswith(f"org/name@main: no connection to {server.endpoint}, or a broken one (HfHubHTTPError: ")
    assert "503" in message
    assert message.endswith("; run the same command again: what is complete is not downloaded again")
    (offline,) = client("org/name", HF_HUB_OFFLINE="1")
    assert "has nothing of it" in offline  # not under that name: it is noted down when all is there
    del server.status[last]
    server.log.clear()
    (snapshot,) = client("org/name")
    assert server.asked() == [last]
    open_checkpoint(snapshot.folder).close()


@pytest.mark.skipif(not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="it does not note down what there is")
def test_without_a_network(server: Hub, client: Client, tmp_path: Path) -> None:
    commit = server.add("org/name", model(tmp_path / "model", shards=2))
    server.add("org/other", {"config.json": b"{}", "model.safetensors": b"x"})
    (sft,) = client(("org/name", True, True))
    server.log.clear()
    cached, incomplete, absent = client(("org/name", True, True), "org/name", "org/other", HF_HUB_OFFLINE="1")
    cache = client.home / "hf" / "hub"
    offline, fix = "the library is offline (HF_HUB_OFFLINE is set)", "unset HF_HUB_OFFLINE to have it downloaded"
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
    assert absent.endswith("has nothing of it; run the same command again: what is complete is not downloaded again")
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
    again = "run the same command again: what is complete is not downloaded again"
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
    client(("org/name", False, False))
    assert "Fetching the weights of org/name: 100%" in client.stderr
    client(("org/name", False, True), HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert client.stderr == ""


@pytest.mark.usefixtures("own_signals")
def test_ctrl_c_ends_a_download_at_once(server: Hub, client: Client) -> None:
    server.add("org/name", {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
    server.stall["model.safetensors"] = 1 << 20
    with client.start("org/name") as process:
        assert server.stalled.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=8)  # the client itself would wait for 10 seconds, and try again
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    del server.stall["model.safetensors"]
    (snapshot,) = client("org/name")
    assert (Path(snapshot.folder) / "model.safetensors").read_bytes() == bytes(3 << 20)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/name@v1: hub ids need huggingface_hub 0\.34 or later, which"):
        hub.fetch(HubId("org/name", "v1"))


LARGE = {f"layers.{i}.weight": ("BF16", (512, 512)) for i in range(6)}  # half a megabyte each
WEIGHTS = "model.safetensors"


@pytest.fixture
def two(server: Hub, tmp_path: Path) -> list[str]:
    """A pair of repositories in 3 shards each; their files."""
    for role, seed in (("sft", 1), ("aligned", 2)):
        write_folder(tmp_path / role, random_tensors(LARGE, seed), 3)
        (tmp_path / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {role: 0}}}))
        server.add(f"org/{role}", files_of(tmp_path / role))
    return [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def weights_asked(server: Hub) -> list[str]:
    return [name for name in server.asked() if name.endswith((".safetensors", ".bin"))]


def test_a_plan_fetches_headers_alone(server: Hub, client: Client, two: list[str]) -> None:
    pairs = (("org/sft", "org/aligned"), ("org/sft", "org/aligned", "--alpha-for", "nothing=1"))
    plans = client.plan(*pairs)
    found, refused = plans
    asked = [(verb, part) for verb, path, part in server.log if path.endswith(".safetensors")]
    assert asked == [("GET", f"bytes=0-{FIRST_REQUEST - 1}")] * 12
    assert sorted(weights_asked(server)) == sorted(two * 4)
    assert sum(server.sent[name] for name in two) == 12 * FIRST_REQUEST
    assert found["outputs"] == ["aligned-expo-0.5"]
    assert found["bytes_read"] == 2 * 6 * 512 * 512 * 2
    assert found["notes"][0].startswith("the tokenizers differ in 1 token id (0 is 'sft' in sft and 'aligned'")
    assert re.search(r"matches no tensor of .*/models--org--aligned/snapshots/", refused["problems"][0])
    offline, snapshot = client("org/aligned", HF_HUB_OFFLINE="1")[0], client("org/aligned")[0]
    assert "has nothing of it" in offline  # the name stands for a commit when all of it is there
    assert read_folder(Path(snapshot.folder)) == random_tensors(LARGE, 2)
    shard = Path(snapshot.folder) / two[1]
    shard.rename(shard.parents[2] / "kept")
    server.log.clear()
    assert client.plan(*pairs) == plans
    assert sorted(weights_asked(server)) == sorted([*two, two[1]] * 2)
    (shard.parents[2] / "kept").rename(shard)
    client(("org/sft", True, True))
    server.log.clear()
    assert client.plan(*pairs) == plans
    assert weights_asked(server) == []
    server.log.clear()
    assert client.plan(*pairs, HF_HUB_OFFLINE="1") == plans
    assert server.log == []


def test_long_headers_and_a_server_that_knows_of_no_ranges(server: Hub, client: Client, tmp_path: Path) -> None:
    shapes = {f"layers.{i}.{'x' * 100}.weight": ("BF16", (64, 64)) for i in range(1000)}
    write_folder(tmp_path / "model", random_tensors(shapes, 1))
    files = files_of(tmp_path / "model")
    for repo in ("org/sft", "org/aligned"):
        server.add(repo, files)
    stop = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    assert stop > 2 * FIRST_REQUEST
    found, local = client.plan(("org/sft", "org/aligned"), (tmp_path / "model", tmp_path / "model"))
    assert len(found["steps"]) == 1000
    assert found == {**local, "outputs": ["aligned-expo-0.5"]}
    assert server.sent[WEIGHTS] == 2 * (FIRST_REQUEST + stop)
    server.whole_only = True
    assert client.plan(("org/sft", "org/aligned")) == [found]


def test_what_there_is_no_plan_of(server: Hub, client: Client, two: list[str]) -> None:
    files = {"config.json": b"{}", WEIGHTS: b"x" * 100}
    server.add("org/gated", files, gated=True)
    server.add("org/broken", files)
    server.add("org/gguf", {**files, WEIGHTS: b"GGUF" + bytes(100_000)})
    server.add("org/tiny", {**files, WEIGHTS: b"tiny"})
    outside = "../../x.safetensors"
    index = json.dumps({"weight_map": {"a": outside}}).encode()
    server.add("org/outside", {"model.safetensors.index.json": index, outside: b"x"})
    pickles = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index = json.dumps({"weight_map": dict(enumerate(pickles))}).encode()
    server.add("org/parts", {"pytorch_model.bin.index.json": index, **dict.fromkeys(pickles, bytes(2_000_000))})
    server.add("org/one", {"config.json": b"{}", "pytorch_model.bin": bytes(3_000_000)})
    server.cut[two[0]] = 1000  # once, and then it is asked for again

    ids = ("org/missing", "org/gated", "org/sft@v9")
    hint = "no such file or folder; as a hub id"
    refused = [f"{name}: {hint}: {said}" for name, said in zip(ids, client(*ids), strict=True)]
    mine = [f"org/{name}" for name in ("broken", "gguf", "tiny", "outside", "parts", "one@main", "sft")]
    plans = client.plan(*(("org/aligned", name) for name in (*ids, *mine)))
    assert [said.removeprefix("expo: error: ").rstrip() for said in plans[:3]] == refused
    broken, gguf, tiny, outside, parts, one, last = plans[3:]
    assert broken.startswith("expo: error: org/broken@main/model.safetensors: header of")
    assert gguf.startswith("expo: error: org/gguf@main/model.safetensors: a GGUF file")
    assert tiny.startswith("expo: error: org/tiny@main/model.safetensors: 4 bytes, but a")
    assert outside.startswith("expo: error: org/outside@main/model.safetensors.index.json: tensor 'a' is said")
    needs = "@main: a plan of .bin weights needs the files themselves, and"
    assert parts == (
        f"expo: error: org/parts: {hint}: org/parts{needs} {', '.join(pickles)}, 4.0 MB in all, are "
        "not in the cache; download with `hf download org/parts --include 'pytorch_model-*-of-*.bin'`, or run "
        "the merge without --plan\n"
    )
    assert f"{needs} pytorch_model.bin, 3.0 MB in all, is not in the cache; download with `hf download org/one" in one
    assert "`hf download org/one --revision main pytorch_model.bin`, or run" in one
    assert not [name for name in weights_asked(server) if name.endswith(".bin")]
    assert last["outputs"] == ["sft-expo-0.5"]
    assert server.cut == {}


def test_a_plan_of_an_adapter(server: Hub, client: Client, two: list[str], tmp_path: Path) -> None:
    below, a, b = (f"base_model.model.layers.0.{name}weight" for name in ("", "lora_A.", "lora_B."))
    shapes = {a: ("BF16", (8, 512)), b: ("BF16", (512, 8))}
    tensors = {**random_tensors(shapes, 3), below: random_tensors(LARGE, 1)["layers.0.weight"]}  # as the base has it
    adapter = tmp_path / "adapter"
    write_folder(adapter, tensors)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    server.add("org/adapter", files_of(adapter))
    pairs: list[Sequence[str | Path]] = [("org/sft", "org/adapter"), ("org/sft", adapter)]
    pairs.append((tmp_path / "sft", "org/adapter"))
    plans = client.plan(*pairs)
    assert plans[0]["outputs"] == ["adapter-expo-0.5"]
    assert plans == [plans[0]] * 3
    assert server.sent["adapter_model.safetensors"] == 2 * FIRST_REQUEST
    client("org/sft", "org/adapter")
    server.log.clear()
    assert client.plan(pairs[0]) == plans[:1]
    assert weights_asked(server) == []


@pytest.mark.usefixtures("own_signals")
def test_ctrl_c_ends_a_plan_at_once(server: Hub, client: Client, two: list[str], tmp_path: Path) -> None:
    server.stall[two[0]] = 1000
    words = ["--sft", "org/sft", "--aligned", "org/aligned", "--alpha", "1", "--plan", "--quiet"]
    with client.run("-m", "expo.fast", *words, TMPDIR=str(tmp_path)) as process:
        assert server.stalled.wait(30)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=8)  # the client itself would wait for 10 seconds, and try again
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "expo: interrupted; nothing was left behind\n"
    assert not list(tmp_path.glob("expo-plan-*"))


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    with (
        pytest.raises(CheckpointError, match=r"org/name@v1: no temporary folder .*FileNotFoundError.*; set TMPDIR to"),
        stand_in_folder(HubId("org/name", "v1")),
    ):
        pass
