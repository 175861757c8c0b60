"""Merges under faults: every system call failing once, full and read-only disks, and limits on files."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import contents, kept, random_tensors, staging_folder, write_folder
from output_faults import CALLS, ERRORS, Fault, refuse_to_sync

import expo
import expo.merging.merge
import expo.output.direct_io
import expo.output.staging
from expo.cli import with_options
from expo.output.journal import journal_path, read_journal

ROOT = Path(__file__).parents[2]
Pair = tuple[Path, Path]


def test_what_a_sync_failed_for_is_not_gone_on_with(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, name = tmp_path / "out", "model-00002-of-00002.safetensors"
    with monkeypatch.context() as patch:
        refuse_to_sync(patch, 1, name)
        with pytest.raises(expo.OutputError, match=rf"{name}: Input/output error; the finished part is kept in"):
            expo.merge(*pair, 0.3, out)
    found = read_journal(journal_path(str(staging_folder(out))))
    assert found is not None
    assert name not in {shard for shard, _ in found.done}
    expo.merge(*pair, 0.3, out, resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert contents(out) == contents(tmp_path / "plain")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_any_call_may_fail_and_what_is_done_is_left_or_nothing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """A folder and a single file, in a folder that has to be created: both are complete, or --resume completes them."""
    files = tuple(sorted(place.glob("*.safetensors"))[0] for place in pair)
    failures = [fail_every_call(inputs, tmp_path, monkeypatch, call, code) for inputs in (pair, files)]
    assert any(failures)


def fail_every_call(
    inputs: tuple[Path, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> int:
    """Merge again and again, with the first call failing, then the second, until none fails.

    Returns the number of calls that failed.
    """
    out = folder / "new" / "out"
    merge = partial(expo.merge, *inputs, 0.3, out, on_unpaired="aligned", digest=True)
    merge()
    whole = contents(out.parent)
    remove(out.parent)
    for k in itertools.count():
        with monkeypatch.context() as patch:
            fault = Fault(patch, call, k, code)
            merged, error = attempt(merge)
        if error is None:
            assert out.exists()
            if fault.hit and call == "fsync":  # the sync of the parent: the output is in place, so this is a warning
                assert any(str(out) in warning for warning in merged.warnings)
            if not fault.hit:
                assert contents(out.parent) == whole
            remove(folder / "new")
        else:
            assert isinstance(error, expo.OutputError), f"call {k}: {error!r}"
            assert str(error).startswith(str(folder / "new"))
            assert os.strerror(code) in str(error)
            assert "Errno" not in str(error)
            if left_to_resume(str(error), out, k):
                merge(resume=True)
                assert contents(out.parent) == whole, f"after call {k} failed"
                remove(folder / "new")
        if not fault.hit:
            return k
    raise AssertionError("unreachable")


def left_to_resume(said: str, out: Path, k: int) -> bool:
    """Return True if the staging folder alone was left, and the message says so; check else that nothing was left."""
    left = sorted(os.listdir(out.parent)) if out.parent.exists() else None
    if "`resume=True`" not in said:
        assert left is None, f"call {k} failed and left {left}"
        return False
    assert left == [staging_folder(out).name], f"call {k} failed and left {left}"
    assert said.endswith(f"; {kept(out)}")
    assert said.count("`resume=True`") == 1
    return True


def attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what the action returned and None, or None and what the action raised."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def remove(folder: Path) -> None:
    """Remove a folder and everything in it. Faults spare shutil.rmtree, so the tests do without it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("call", [call for call in CALLS if call != "link"])
@pytest.mark.parametrize("swap", [True, False])
def test_whatever_fails_while_overwriting_an_old_or_the_new_model_is_there(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, swap: bool
) -> None:
    out = tmp_path / "out"
    if not swap:
        monkeypatch.setattr(expo.output.staging, "exchange", lambda *_: False)
    expo.merge(*pair, 0.3, tmp_path / "expected")
    new = contents(tmp_path / "expected")
    remove(tmp_path / "expected")
    merge = partial(expo.merge, *pair, 0.3, out, overwrite=True)
    for k in itertools.count():
        out.mkdir()
        (out / "old.safetensors").write_text("old")
        with monkeypatch.context() as patch:
            fault = Fault(patch, call, k, errno.EIO)
            merged, error = attempt(merge)
        assert error is None or (fault.hit and isinstance(error, expo.OutputError)), f"call {k}: {error!r}"
        left = sorted({*os.listdir(tmp_path)} - {"al", "out", "sft"})
        if error is not None:
            assert [path.read_text() for path in out.iterdir()] == ["old"], f"call {k} failed"
            assert left == ([staging_folder(out).name] if "`resume=True`" in str(error) else []), f"call {k} failed"
            assert not left or str(error).endswith(f"; {kept(out)}")
            merge(resume=True)
            left = sorted({*os.listdir(tmp_path)} - {"al", "out", "sft"})
        elif left:  # the output is in place, and a leftover could not be removed
            assert any(str(tmp_path / left[0]) in warning for warning in merged.warnings)
            (tmp_path / left.pop()).unlink()
        assert left == [], f"after call {k} failed"
        assert contents(out) == new, f"after call {k} failed"
        remove(out)
        if not fault.hit:
            break


@pytest.mark.parametrize("fallocates", [True, False])
def test_a_disk_that_fills_up_during_a_merge(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fallocates: bool
) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"w": ("BF16", (400, 500))}
    pair = [write_folder(tmp_path / name, random_tensors(shapes, 1)) for name in ("sft", "aligned")]
    place = mounted("size=256k")
    with pytest.raises(
        expo.OutputError, match=f"{place}/out: .* are needed, but .* are free; free some space or choose"
    ):
        expo.merge(*pair, 0.3, place / "out")
    monkeypatch.setattr(expo.merging.output_paths, "free_bytes", lambda _: 1 << 40)
    if not fallocates:
        monkeypatch.setattr(expo.output.direct_io, "allocate", os.ftruncate)
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(*pair, 0.3, place / "out")
    assert "No space left on device; free some space or choose another `out`; " in str(caught.value)
    assert str(caught.value).endswith(f"; {kept(place / 'out')}")
    assert os.listdir(place) == [staging_folder(place / "out").name]
    subprocess.run(["mount", "-o", "remount,size=1m", str(place)], check=True)
    expo.merge(*pair, 0.3, place / "out", resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert os.listdir(place) == ["out"]
    assert contents(place / "out") == contents(tmp_path / "plain")


def test_a_read_only_filesystem(pair: Pair, mounted: Callable[[str], Path]) -> None:
    place = mounted("ro")
    message = f"{place}.*: Read-only file system; the filesystem is read-only: choose another `out`"
    with pytest.raises(expo.OutputError, match=message):
        expo.merge(*pair, 0.3, place / "new" / "out")
    assert os.listdir(place) == []


def test_a_limit_on_the_size_of_files(pair: Pair, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expo.fast", "--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert (
        "File too large; the filesystem or a limit (ulimit -f) refuses files of this size; the finished part"
        in done.stderr
    )
    assert done.stderr.endswith(f"; {with_options(kept(tmp_path / 'out'))}\n")
    assert sorted(os.listdir(tmp_path)) == [".out.expo-staging", "al", "sft"]
    expo.merge(*pair, 0.3, tmp_path / "out", resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path)) == ["al", "out", "plain", "sft"]
