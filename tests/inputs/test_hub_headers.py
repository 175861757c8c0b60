"""Plans of hub ids: headers are fetched without the weights, and nothing is left behind."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoint_files import random_tensors, read_folder, write_folder
from hub_client import Client
from hub_server import Hub, files_of

from expo.errors import CheckpointError
from expo.inputs.hub_headers import FIRST_REQUEST, stand_in_folder
from expo.inputs.hub_ids import HubId

LARGE = {f"layers.{i}.weight": ("BF16", (512, 512)) for i in range(6)}  # half a megabyte each
WEIGHTS = "model.safetensors"


@pytest.fixture
def two(server: Hub, tmp_path: Path) -> list[str]:
    """Add a pair of repositories with 3 shards each to the hub; return the names of the shards."""
    for role, seed in (("sft", 1), ("aligned", 2)):
        write_folder(tmp_path / role, random_tensors(LARGE, seed), 3)
        (tmp_path / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {role: 0}}}))
        server.add(f"org/{role}", files_of(tmp_path / role))
    return [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def weights_asked(server: Hub) -> list[str]:
    """Return the weight files among the files that were requested since the log was last cleared."""
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
    assert "has nothing of it" in offline  # the cache records a revision when all of its files are there
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
    server.cut[two[0]] = 1000  # the connection breaks once, and the second request succeeds

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
    copy = random_tensors(LARGE, 1)["layers.0.weight"]  # the base's tensor
    tensors = {**random_tensors(shapes, 3), below: copy}
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
        # An interrupt in the middle of writing a header makes Python warn of a file left open, so the two headers that
        # arrive are awaited: from then on the command waits for the third.
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("expo-plan-*/model-*.safetensors"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=8)  # the library by itself would wait 10 seconds and try again
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
