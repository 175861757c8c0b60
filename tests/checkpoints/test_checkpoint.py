"""Opening checkpoints: a file, a folder with one file, shards with an index, and the messages of those refused."""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Tensors, random_tensors, safetensors_bytes, write_folder

from expo.checkpoints.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoints.files import INDEX, MAX_JSON, SINGLE
from expo.errors import CheckpointError

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed": ("BF16", (32, 8)), "layer.0": ("F32", (5, 7)), "layer.1": ("F16", (3,)), "scale": ("F64", ()),
    "steps": ("I64", (4,)), "mask": ("BOOL", (13,)), "empty": ("BF16", (0, 9)),
}  # fmt: skip
TENSORS = random_tensors(SHAPES, seed=3)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def contents(checkpoint: Checkpoint) -> Tensors:
    """Return every tensor as (dtype, shape, bytes), through the readers of the shards."""
    found = {}
    for name, info in checkpoint.tensors.items():
        memory = bytearray(info.nbytes)
        checkpoint.reader(name).read(info.start, memory)
        found[name] = (info.dtype, info.shape, bytes(memory))
    return found


def refusal(path: str | os.PathLike[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "Traceback" not in message
    return message


def soon(action: Callable[[], Any], fifo: Path | None = None) -> Any:
    """Return the result of the action, or the exception that it raises; fail if it is not done within seconds."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(3)
    hangs = thread.is_alive()
    if hangs and fifo is not None:  # a writer that closes the FIFO ends the thread
        with contextlib.suppress(OSError):
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        thread.join(3)
    assert not hangs, "the action does not end"
    return results[0]


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sharded", TENSORS, shards=2)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "single", TENSORS)


# Checkpoints that can be opened.


@pytest.mark.parametrize("pad", [0, 1, 3, 4096])
def test_bare_file(tmp_path: Path, pad: int) -> None:
    path = tmp_path / "merged.v2.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, {"format": "pt"}, pad))
    checkpoint = open_checkpoint(path)
    assert contents(checkpoint) == TENSORS
    assert (checkpoint.folder, checkpoint.index, checkpoint.config, checkpoint.files) == (None, None, {}, {})
    assert list(checkpoint.shards) == ["merged.v2.safetensors"]
    assert set(checkpoint.weight_map.values()) == {"merged.v2.safetensors"}
    assert checkpoint.name == "merged.v2"
    checkpoint.close()


def test_folder_with_a_single_file(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert contents(checkpoint) == TENSORS
    assert checkpoint.folder == str(single)
    assert checkpoint.index is None
    assert checkpoint.config == {"model_type": "llama"}
    assert (*checkpoint.files,) == ("config.json",)
    assert checkpoint.name == "single"
    checkpoint.close()


@pytest.mark.parametrize("shards", [1, 2, 7, [["mask", "embed"], ["scale"], ["layer.1", "layer.0", "empty", "steps"]]])
@pytest.mark.parametrize("pad", [0, 1])
def test_shards(tmp_path: Path, shards: Any, pad: int) -> None:
    folder = write_folder(tmp_path / "model", TENSORS, shards=shards, pad=pad)
    checkpoint = open_checkpoint(folder)
    assert contents(checkpoint) == TENSORS
    assert checkpoint.index is not None
    assert checkpoint.weight_map == checkpoint.index["weight_map"]
    assert list(checkpoint.shards) == sorted(set(checkpoint.weight_map.values()))
    assert (*checkpoint.files,) == ("config.json",)
    checkpoint.close()


def test_path_as_text_relative_and_with_a_slash_at_its_end(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single.parent)
    for path in ("single", "single/", "./single", "single/."):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == path
        assert checkpoint.name == "single"
    monkeypatch.chdir(single)
    assert open_checkpoint(".").name == "single"


def test_single_file_wins_over_an_index_and_absent_shards(sharded: Path) -> None:
    other = random_tensors(SHAPES, seed=4)
    (sharded / SINGLE).write_bytes(safetensors_bytes(other))
    (sharded / FIRST).unlink()
    checkpoint = open_checkpoint(sharded)
    assert contents(checkpoint) == other
    assert checkpoint.index is None
    assert (*checkpoint.files,) == ("config.json", SECOND), "files of the other form are like any others"
    checkpoint.close()


def test_folder_without_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert open_checkpoint(single).config == {}


def test_links_to_files_and_folders_are_followed(single: Path, tmp_path: Path) -> None:
    """The snapshot folders of a hub's cache have links to blobs."""
    (tmp_path / "blobs").mkdir()
    (single / SINGLE).rename(tmp_path / "blobs" / "4d7a")
    (single / SINGLE).symlink_to("../blobs/4d7a")
    (tmp_path / "snapshot").symlink_to("single")
    checkpoint = open_checkpoint(tmp_path / "snapshot")
    assert contents(checkpoint) == TENSORS
    assert checkpoint.name == "snapshot"
    checkpoint.close()


def test_index_keeps_its_other_members(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(extra=[1, 2]))
    index = open_checkpoint(sharded).index
    assert index is not None
    assert index["extra"] == [1, 2]


def test_opening_reads_no_tensor_and_keeps_no_file_open(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor byte was asked for")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("expo.checkpoints.reader.mmap.mmap", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert len(os.listdir("/proc/self/fd")) == before


# The files beside the weights.


def test_files_are_sorted_relative_and_without_hidden_folders(sharded: Path) -> None:
    for name in ("z.txt", "A.txt", ".gitattributes", "onnx/model.onnx", "a/b/c.json", ".git/config", "a/.cache/x"):
        path = sharded / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    found = open_checkpoint(sharded).files
    assert (*found,) == (".gitattributes", "A.txt", "a/b/c.json", "config.json", "onnx/model.onnx", "z.txt")


def test_files_with_the_name_of_a_shard_in_a_subfolder_are_listed(sharded: Path) -> None:
    (sharded / "copy").mkdir()
    (sharded / "copy" / FIRST).write_bytes(b"")
    assert (*open_checkpoint(sharded).files,) == ("config.json", f"copy/{FIRST}")


def test_files_leave_out_what_is_no_regular_file(single: Path) -> None:
    os.mkfifo(single / "fifo")
    (single / "dangling").symlink_to("nowhere")
    (single / "loop").symlink_to("loop")
    (single / "again").symlink_to(".")
    (single / "linked.txt").symlink_to("config.json")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(single)  # a socket's path has at most 107 bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        checkpoint = soon(lambda: open_checkpoint(single), single / "fifo")
    assert (*checkpoint.files,) == ("config.json", "linked.txt")


# The bytes. The tests of files that change are in test_reader.py.


@pytest.mark.parametrize("name", [SINGLE, FIRST])
def test_a_shard_knows_its_file(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model", TENSORS, shards=0 if name == SINGLE else 2)
    shard = open_checkpoint(folder).shards[name]
    data = (folder / name).read_bytes()
    assert shard.path == shard.reader.path == str(folder / name)
    assert shard.size == shard.reader.identity.size == len(data)
    assert shard.reader.identity.modified == (folder / name).stat().st_mtime_ns
    assert shard.digest == hashlib.sha256(data[8 : 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def test_close_closes_every_shard_and_its_bytes_can_be_read_again(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        checkpoint.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert str(sharded) not in Path("/proc/self/maps").read_text()
        assert contents(checkpoint) == TENSORS
        assert len(os.listdir("/proc/self/fd")) > before
    checkpoint.close()
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", [1, -1])
def test_a_shard_that_changes_after_its_header_was_read(single: Path, change: int) -> None:
    checkpoint = open_checkpoint(single)
    size = (single / SINGLE).stat().st_size
    os.truncate(single / SINGLE, size + change)
    with pytest.raises(CheckpointError) as caught:
        contents(checkpoint)
    message = str(caught.value)
    assert message.startswith(f"{single / SINGLE}: {size + change} bytes now")
    assert f"and had {size} bytes" in message


# Files and folders that cannot be opened.


@pytest.mark.parametrize("path", ["absent", "absent/model.safetensors", "", "nul\0byte", "x" * 5000, "org/name"])
def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(path) == f"{path or repr(path)}: no such file or folder"


def test_a_path_that_may_not_be_looked_at_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", stat)
    assert refusal("closed") == "closed: Permission denied"


def test_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: none of")
    assert SINGLE in message
    assert INDEX in message


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model-00001-of-00002.bin", ("none of", "save_pretrained()")),
        ("consolidated.00.pth", ("the names of the model's authors", "in transformers' format")),
        ("model.Q4_K_M.gguf", ("a GGUF file, quantised as Q4_K_M", "made from", "save it with save_pretrained()")),
        ("model-f16.gguf", ("a GGUF file, most often quantised", "save it with save_pretrained()")),
        ("adapter_model.safetensors", ("a PEFT adapter without its adapter_config.json",)),
        ("adapter_config.json", ("a PEFT adapter; only `aligned` may be one",)),
    ],
)
def test_folder_of_another_form(tmp_path: Path, file: str, words: tuple[str, ...]) -> None:
    (tmp_path / file).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}")
    assert [word for word in words if word not in message] == []


def test_bare_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model-IQ2_XS.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(range(64)))
    assert refusal(path).startswith(f"{path}: a GGUF file, quantised as IQ2_XS, which cannot be extrapolated; use the")


def test_no_tensors_in_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({}))
    assert refusal(path) == f"{path}: no tensors in it"


@pytest.mark.parametrize("sharding", [0, 2])
@pytest.mark.parametrize("lost", [1, 100])
def test_truncated_shard(tmp_path: Path, sharding: int, lost: int) -> None:
    folder = write_folder(tmp_path / "model", TENSORS, shards=sharding)
    path = folder / (SECOND if sharding else SINGLE)
    size = path.stat().st_size
    os.truncate(path, size - lost)
    message = refusal(folder)
    assert message.startswith(f"{path}: ")
    assert str(size) in message
    assert str(size - lost) in message
    assert "truncated; download it again" in message


def test_empty_file_and_git_lfs_pointer(single: Path) -> None:
    (single / SINGLE).write_bytes(b"")
    assert refusal(single).startswith(f"{single / SINGLE}: 0 bytes")
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "git lfs pull" in refusal(single)


# The index.


def test_index_names_an_absent_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX}: ")
    assert SECOND in message
    assert "not in the folder" in message


def test_index_names_an_absent_tensor(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head": FIRST}))
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.tensors) == set(TENSORS)
    (note,) = checkpoint.notes
    assert note.startswith(f"{sharded / INDEX}: 'lm_head' is in the index and in no shard")


def test_index_puts_a_tensor_into_another_shard(sharded: Path) -> None:
    assert json.loads((sharded / INDEX).read_text())["weight_map"]["embed"] == FIRST
    edit_index(sharded, lambda index: index["weight_map"].update({"embed": SECOND}))
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.weight_map["embed"] == FIRST
    (note,) = checkpoint.notes
    assert note == (
        f"{sharded / INDEX}: 'embed' is in another shard than the index says; the one in {FIRST} counts, as "
        "transformers reads whole shards"
    )


def test_tensor_that_is_not_in_the_index(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("embed"))
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.weight_map["embed"] == FIRST
    (note,) = checkpoint.notes
    assert note.startswith(f"{sharded / INDEX}: 'embed' is in a shard and not in the index")


@pytest.mark.parametrize(
    "name",
    [
        "../x", "../model.safetensors", "/etc/passwd", "a/b", "./model.safetensors", "..", ".", "", "x/", None, 1, True,
        ["model.safetensors"], {"a": "b"},
    ],
    ids=str,
)  # fmt: skip
def test_index_leads_out_of_the_folder_or_nowhere(sharded: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"embed": name}))
    (sharded.parent / "x").write_bytes(safetensors_bytes(TENSORS))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX}: tensor 'embed' is said to be in {name!r}")
    assert "not a file name in this folder" in message


@pytest.mark.parametrize("name", ["nul\0byte", "\ud800", "x" * 5000, "config.json", INDEX])
def test_index_names_what_cannot_be_a_shard(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"embed": name}))
    assert str(sharded) in refusal(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, {"metadata": {}}])
def test_index_without_a_weight_map(sharded: Path, index: Any) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX}: ")
    assert "weight_map" in message


# JSON files.

NOT_JSON = {
    "empty": b"",
    "half": b'{"model_type": ',
    "html": b"<!doctype html>",
    "not UTF-8": b'{"a": "\xff"}',
    "bomb of lists": b"[" * 200_000,
    "bomb of objects": b'{"a":' * 200_000,
    "number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("kind", NOT_JSON)
def test_not_json(sharded: Path, file: str, kind: str) -> None:
    (sharded / file).write_bytes(NOT_JSON[kind])
    message = refusal(sharded)
    assert message.startswith(f"{sharded / file}: not JSON (")
    assert len(message) < len(str(sharded)) + 300


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("1", "int"), ('"a"', "str"), ("true", "bool")]
)
def test_json_that_is_no_object(sharded: Path, file: str, text: str, kind: str) -> None:
    (sharded / file).write_text(text)
    message = refusal(sharded)
    assert message.startswith(f"{sharded / file}: ")
    assert kind in message
    assert "an object is expected" in message


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_of_absurd_size(sharded: Path, file: str) -> None:
    os.truncate(sharded / file, MAX_JSON + 1)  # sparse: no disk is used
    message = refusal(sharded)
    assert message.startswith(f"{sharded / file}: {MAX_JSON + 1} bytes")
    assert str(MAX_JSON) in message


# Paths that are no regular files.


@pytest.mark.parametrize("file", [SINGLE, INDEX, "config.json"])
def test_folder_in_the_place_of_a_file(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path / "model", TENSORS, shards=2)
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert refusal(folder) == f"{folder / file}: Is a directory"


@pytest.mark.parametrize("file", [SINGLE, INDEX, "config.json", FIRST])
def test_fifo_in_the_place_of_a_file(sharded: Path, file: str) -> None:
    """open() of a FIFO waits for a writer, and there is none."""
    (sharded / file).unlink(missing_ok=True)
    os.mkfifo(sharded / file)
    error = soon(lambda: open_checkpoint(sharded), sharded / file)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"{sharded / file}: ")


def test_fifo_as_the_path_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    error = soon(lambda: open_checkpoint(tmp_path / "fifo"), tmp_path / "fifo")
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"{tmp_path / 'fifo'}: ")


def test_device_as_the_path() -> None:
    error = soon(lambda: open_checkpoint("/dev/zero"))
    assert isinstance(error, CheckpointError)
    assert str(error).startswith("/dev/zero: ")


@pytest.mark.parametrize("file", [SINGLE, FIRST, INDEX, "config.json"])
def test_link_to_itself_in_the_place_of_a_file(sharded: Path, file: str) -> None:
    if file == SINGLE:
        (sharded / INDEX).unlink()
    (sharded / file).unlink(missing_ok=True)
    (sharded / file).symlink_to(file)
    message = refusal(sharded)
    assert str(sharded) in message
    assert file in message


def test_link_to_itself_as_the_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop").startswith(f"{tmp_path / 'loop'}: ")


def test_folders_that_link_in_a_circle(single: Path) -> None:
    (single / "a").mkdir()
    (single / "a" / "b").symlink_to("..")
    (single / "a" / "text").write_text("")
    checkpoint = soon(lambda: open_checkpoint(single))
    assert (*checkpoint.files,) == ("a/text", "config.json")


@pytest.mark.parametrize("file", [SINGLE, "config.json"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_unreadable_file(single: Path, monkeypatch: pytest.MonkeyPatch, file: str, code: int) -> None:
    """The error is injected, as root may read every file."""
    real_open, real_os_open = builtins.open, os.open

    def refuse(path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path) == str(single / file):
            raise OSError(code, os.strerror(code), os.fspath(path))

    def fake_open(path: Any, *arguments: Any, **options: Any) -> Any:
        refuse(path)
        return real_open(path, *arguments, **options)

    def fake_os_open(path: Any, *arguments: Any, **options: Any) -> int:
        refuse(path)
        return real_os_open(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", fake_open)
    monkeypatch.setattr(os, "open", fake_os_open)
    assert refusal(single) == f"{single / file}: {os.strerror(code)}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", [SINGLE, "config.json"])
def test_file_without_permission(single: Path, file: str) -> None:
    (single / file).chmod(0)
    assert refusal(single) == f"{single / file}: Permission denied"
