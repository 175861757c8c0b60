"""Hub ids and the paths of snapshots: which texts are hub ids, and which paths are snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from expo.inputs.hub_ids import HubId, parse_hub_id, snapshot_origin

SHA = "0123456789abcdef0123456789abcdef01234567"


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
