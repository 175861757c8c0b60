"""Names of inputs that are near to a path or a hub id: each message says what to write, and that text is right."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from checkpoint_files import contents
from hub_client import Client
from hub_server import Hub, Repo

import expo
from expo.errors import CheckpointError
from expo.inputs.hints import parse_address

DEMO = Path(__file__).parents[2] / "expo" / "demo"


def refusal(sft: str, aligned: str = str(DEMO / "aligned")) -> str:
    with pytest.raises(CheckpointError) as caught:
        expo.merge(sft, aligned, 0.3, "out")
    return str(caught.value)


def advised(message: str) -> str:
    """Return the text that a message says to write, as a shell would pass it on."""
    (word,) = shlex.split(message.partition(": write ")[2])
    return word


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder, with a blank in its path, that is not the current folder."""
    home = tmp_path / "my home"
    (tmp_path / "place").mkdir()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "place")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_a_quoted_tilde(home: Path) -> None:
    shutil.copytree(DEMO / "sft", home / "models" / "sft")
    message = refusal("~/models/sft")
    assert message.startswith("~/models/sft: no such file or folder; the shell expands ~ only at the start of a word ")
    expo.merge(advised(message), DEMO / "aligned", 0.3, "out")
    expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, "expected")
    weights = [
        {name: data for name, data in contents(Path(out)).items() if name != "README.md"} for out in ("out", "expected")
    ]
    assert weights[0] == weights[1]


def test_a_quoted_tilde_before_nothing(home: Path) -> None:
    expected = (
        f"~/nowhere: no such file or folder; no shell has expanded the ~, and {home}/nowhere does not exist either"
    )
    assert refusal("~/nowhere") == expected
    assert refusal("~nobody-of-this-name/x") == "~nobody-of-this-name/x: no such file or folder"
    Path("~").mkdir()
    shutil.copytree(DEMO / "sft", "~/sft")
    expo.merge("~/sft", DEMO / "aligned", 0.3, "out")  # a folder of this name counts


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("https://huggingface.co/org/name", "org/name", None),
        ("http://www.huggingface.co/org/name/", "org/name", None),
        ("huggingface.co/org/name", "org/name", None),
        ("HTTPS://HuggingFace.co/org/Name", "org/Name", None),
        ("https://hf.co/org/name?library=x#files", "org/name", None),
        ("https://huggingface.co/org/name.git", "org/name", None),
        ("https://huggingface.co/org/name-v0.1/tree/main", "org/name-v0.1", None),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name", "v1.0"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/org/name/tree/refs/pr/1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", "org/name", None),
        ("https://huggingface.co/org/name/resolve/abc/a/b.json?download=true", "org/name", "abc"),
        ("https://huggingface.co/org/name/commit/0123abc", "org/name", "0123abc"),
        ("https://huggingface.co/org/name/discussions/3", "org/name", None),
        ("hf://org/name", "org/name", None),
        ("hf://models/org/name@v1/model.safetensors", "org/name", "v1"),
        ("hf://org/name@refs/pr/1", "org/name", "refs/pr/1"),
    ],
)
def test_addresses_of_the_hub(text: str, repo: str, revision: str | None) -> None:
    assert parse_address(text) == (repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "org/name", "org/name/tree/main", "here/a/b", "https://huggingface.co", "https://huggingface.co/org",
        "https://huggingface.co/datasets/org/name", "https://huggingface.co/spaces/org/name", "hf://org",
        "https://example.org/org/name", "https://huggingface.co/docs/transformers", "https://huggingface.co/a--b/c",
        "/huggingface.co/org/name", "s3://bucket/name", "",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert parse_address(text) is None


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_without_weights_that_has_the_name_of_a_repository(home: Path) -> None:
    (Path("org") / "sft").mkdir(parents=True)
    message = refusal("org/sft")
    assert message.startswith("org/sft: none of model.safetensors, ")
    assert message.endswith("if you mean the repository there, write org/sft@main")
    (Path("org") / "sft" / "model.safetensors").write_bytes(b"damaged")
    assert "repository" not in refusal("org/sft"), "the folder is meant to be a checkpoint"


def test_the_ids_that_messages_name_are_right(server: Hub, client: Client) -> None:
    """The hub of the test is at an address of its own, which HF_ENDPOINT names."""
    server.repos["org/sft"] = Repo()
    server.repos["org/sft"].commit(files(DEMO / "sft"), "v1", "main")
    aligned = DEMO / "aligned"
    pages = f"{server.endpoint}/org/sft/tree/v1", "https://huggingface.co/org/sft/blob/v1/config.json"
    names = *pages, "org/sft@v1", "org/sft@main", DEMO / "sft"
    *messages, tagged, main, local = client.plan(*((name, aligned) for name in names))
    assert messages == [
        f"expo: error: {page}: no such file or folder; the address of a repository on the hub, for which you write its "
        "id: org/sft@v1\n"
        for page in pages
    ]
    assert local["steps"]
    assert tagged == main == local


@pytest.mark.parametrize("evidence", ["cache", "recipe", "none", "snapshot"])
def test_a_checkpoint_that_has_the_name_of_a_repository_is_used_and_said(
    evidence: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "HuggingFaceH4/zephyr-7b-beta" if evidence == "recipe" else "models/aligned"
    cache = home / ".cache" / "huggingface" / "hub" / "models--models--aligned"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(DEMO / "aligned", snapshot if evidence == "snapshot" else name)
    if evidence == "cache":
        cache.mkdir(parents=True)
    if evidence == "snapshot":  # the folder is a link to the repository itself
        Path("models").mkdir()
        Path(name).symlink_to(snapshot)
    from expo.fast import main

    assert main(["--sft", str(DEMO / "sft"), "--aligned", name, "--alpha", "0.3", "--plan", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    said = f"{name} is a folder here, and it is used; the hub has a repository of this name, which is {name}@main"
    assert notes == ([said] if evidence in ("cache", "recipe") else [])
