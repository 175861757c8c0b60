"""The staging folder: its lock, what it leaves behind, and the commit of one output or several."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import contents, fingerprint, kept, read_folder

import expo
import expo.merging.merge
import expo.output.journal
import expo.output.staging
from expo.output.staging import Staging

ROOT = Path(__file__).parents[2]
Pair = tuple[Path, Path]


HOLDER = """
import sys
from expo.output.staging import Staging
staging = Staging(sys.argv[1], False, False)
staging.put("half.json", [b"{"])
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_lock_on_the_folder_dies_with_its_owner(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        for options in ((False, False), (True, False), (False, True), (True, True)):
            with pytest.raises(expo.OutputError, match=f"{out}: another merge is writing it now"):
                Staging(out, False, *options)
        owner.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == [".out.expo-staging"]
    with pytest.raises(expo.OutputError, match="was left by an interrupted merge: `resume=True` continues it, `overwr"):
        Staging(out, False, False)
    for overwrite in (False, True):
        with Staging(out, False, overwrite, True):  # a folder to resume from stays, also with --overwrite
            assert os.listdir(tmp_path / ".out.expo-staging") == ["half.json"]
    with Staging(out, False, True) as staging:
        assert os.listdir(staging.folder) == []
    assert os.listdir(tmp_path) == []


def test_of_two_that_start_at_the_same_moment_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process locks the staging folder after this merge has created it and before it locks it."""
    real = os.mkdir
    others: list[int] = []

    def mkdir(path: Any, *rest: Any, **named: Any) -> None:
        real(path, *rest, **named)
        others.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        fcntl.flock(others[0], fcntl.LOCK_EX)

    monkeypatch.setattr(os, "mkdir", mkdir)
    try:
        with (
            pytest.raises(expo.OutputError, match="another merge is writing it now"),
            Staging(str(tmp_path / "out"), False, True),
        ):
            pass
        assert os.listdir(tmp_path) == [".out.expo-staging"]  # the folder belongs to the other merge
    finally:
        os.close(others[0])


def test_what_is_cleaned_up_after_a_commit_is_not_anothers(tmp_path: Path) -> None:
    """Another merge may begin to overwrite the output between a commit and the end of the merge that made it."""
    out = str(tmp_path / "out")
    with Staging(out, False, False) as first:
        first.put("model.safetensors", [b"first"])
        first.commit()
        second = Staging(out, False, True)
        second.put("model.safetensors", [b"second"])
    with second:
        second.put("config.json", [b"{}"])
        second.commit()
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert (Path(out) / "model.safetensors").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_filesystem_without_locks_is_written_all_the_same(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["al", "out", "sft"]


def test_a_leftover_that_cannot_be_emptied_is_an_error_that_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / ".out.expo-staging"
    staging.mkdir()
    (staging / "half.json").write_text("{")

    def unlink(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(expo.OutputError, match=f"{staging}: Permission denied"):
            Staging(str(tmp_path / "out"), False, True)


def test_put_makes_subfolders_and_refuses_to_write_twice(tmp_path: Path) -> None:
    with Staging(str(tmp_path / "out"), False, False) as staging:
        staging.put("sub/code.py", [b"x = 1"])
        with pytest.raises(expo.OutputError, match=r"sub/code\.py: File exists"):
            staging.put("sub/code.py", [b"x = 2"])
        staging.commit()
    assert (tmp_path / "out" / "sub" / "code.py").read_bytes() == b"x = 1"


def test_without_a_commit_nothing_appears(tmp_path: Path) -> None:
    with Staging(str(tmp_path / "a" / "b" / "out"), False, False) as staging:
        staging.put("config.json", [b"{}"])
        assert os.listdir(tmp_path / "a" / "b") == [".out.expo-staging"]
    assert os.listdir(tmp_path) == []


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expo.output.journal, "INTERVAL", 1e9)
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(fd: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def log_rename(*arguments: Any) -> None:
        events.append("rename")
        rename(*arguments)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    expo.merge(*pair, 0.3, tmp_path / "out")
    shards = sorted(path.name for path in pair[1].glob("*.safetensors"))
    journal, index = ".expo-journal", "model.safetensors.index.json"
    assert events[0] == journal  # the line that names the merge
    assert events[1:3] == [".out.expo-staging", tmp_path.name]  # the shards' names last before the journal lists any
    assert sorted(events[3:5]) == shards
    assert events[5:] == [
        journal, "config.json", "README.md", index, "rename", ".out.expo-staging", "rename", tmp_path.name
    ]  # fmt: skip


def test_a_bare_file_on_a_filesystem_without_hard_links(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename puts the file in place there, unless the name has been taken meanwhile."""
    sft, aligned = (sorted(place.glob("*.safetensors"))[0] for place in pair)
    out = tmp_path / "out.safetensors"

    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    merge = partial(expo.merge, sft, aligned, 0.3, on_unpaired="aligned")
    with pytest.raises(expo.OutputError, match=f"^{out}: File exists; {kept(out)}$"):
        merge(out, progress=lambda *_: out.write_text("years of work"))
    assert out.read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == [".out.safetensors.expo-staging", "al", "out.safetensors", "sft"]
    out.unlink()
    merged = merge(out, resume=True)
    assert merged.resumed == merged.bytes_written
    assert sorted(os.listdir(tmp_path)) == ["al", "out.safetensors", "sft"]
    merge(tmp_path / "plain")
    assert out.read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_filesystem_that_cannot_swap_replaces_in_two_steps_and_says_so(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expo.merge(*pair, 0.5, tmp_path / "out")
    (tmp_path / "out" / "stale.json").write_text("{}")
    monkeypatch.setattr(expo.output.staging, "exchange", lambda *_: False)
    merged = expo.merge(*pair, 0.3, tmp_path / "out", overwrite=True)
    message = f"{tmp_path}/out was replaced in two steps: this filesystem cannot swap folders"
    assert message in merged.warnings
    assert not (tmp_path / "out" / "stale.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["al", "out", "sft"]


def test_an_old_model_that_cannot_be_removed_is_named(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    expo.merge(*pair, 0.3, out)

    def rmtree(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        merged = expo.merge(*pair, 0.5, out, overwrite=True)
    old = tmp_path / ".out.expo-staging"
    warning = f"{old}, the model that was replaced, could not be removed: Permission denied"
    assert merged.warnings[-1] == warning
    assert old.exists()
    assert read_folder(out) != read_folder(old)


def test_the_replaced_model_is_locked_until_it_is_gone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replaced model has the staging folder's name: without a lock another merge would take it for a leftover."""
    out = tmp_path / "out"
    expo.merge(*pair, 0.3, out)
    refused: list[str] = []
    rmtree = shutil.rmtree

    def meanwhile(path: Any, *rest: Any, **named: Any) -> None:
        if not refused:
            with pytest.raises(expo.OutputError, match="another merge is writing it now") as caught:
                Staging(str(out), False, True)
            refused.append(str(caught.value))
        rmtree(path, *rest, **named)

    monkeypatch.setattr(shutil, "rmtree", meanwhile)
    expo.merge(*pair, 0.5, out, overwrite=True)
    assert len(refused) == 1
    assert sorted(os.listdir(tmp_path)) == ["al", "out", "sft"]


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupt_after_the_swap_says_what_is_in_place(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """The replaced model is removed all the same, and the message does not claim that nothing has happened."""
    out = tmp_path / "out"
    expo.merge(*pair, 0.5, tmp_path / "expected")
    expo.merge(*pair, 0.3, out)
    if resume:
        with pytest.raises(ZeroDivisionError):
            expo.merge(*pair, 0.5, out, overwrite=True, progress=lambda *_: 1 // 0)
    rmtree, calls = shutil.rmtree, itertools.count()

    def interrupted(*arguments: Any, **named: Any) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt
        rmtree(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"^already in place: {out}$"):
            expo.merge(*pair, 0.5, out, overwrite=True, resume=resume)
    assert read_folder(out) == read_folder(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["al", "expected", "out", "sft"]


def test_of_several_outputs_an_error_names_those_in_place(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, itertools.count()

    def second_fails(*arguments: Any) -> None:
        if os.path.isdir(arguments[0]) and next(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(*arguments)

    first, second = tmp_path / "out0.1", tmp_path / "out0.3"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        message = f"^{second}: Input/output error; already in place: {first}; {kept(second)}$"
        with pytest.raises(expo.OutputError, match=message):
            expo.merge(*pair, [0.1, 0.3], tmp_path / "out{alpha}")
    left = [".out0.1.expo-journal", ".out0.3.expo-staging", "al", "out0.1", "sft"]
    assert sorted(os.listdir(tmp_path)) == left
    before = fingerprint(first)
    with monkeypatch.context() as patch:  # a full disk: the bytes of the staging folder are on it already
        patch.setattr(expo.merging.output_paths, "free_bytes", lambda _: 0)
        expo.merge(*pair, [0.1, 0.3], tmp_path / "out{alpha}", resume=True, verify=True)
    assert sorted(os.listdir(tmp_path)) == ["al", "out0.1", "out0.3", "sft"]
    assert fingerprint(first) == before
    expo.merge(*pair, [0.1, 0.3], tmp_path / "plain{alpha}")
    assert contents(first) == contents(tmp_path / "plain0.1")
    assert contents(second) == contents(tmp_path / "plain0.3")
