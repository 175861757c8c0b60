"""The writer under faults: no O_DIRECT, short writes, full disks, and every system call failing once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_files import contents, fingerprint, kept, random_tensors, read_folder, staging_folder, write_folder

import expo
import expo.execution.worker_pool
import expo.merging.merge
import expo.output.atomic
import expo.output.direct_io
import expo.output.journal
import expo.output.staging
from expo.memory import PAGE, page_aligned
from expo.output.atomic import exchange
from expo.output.direct_io import O_DIRECT, ShardWriter, create_shard
from expo.output.staging import Staging

ROOT = Path(__file__).parents[2]
Pair = tuple[Path, Path]
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("BF16", (64, 65)), "b": ("F32", (33,)), "c": ("I64", (3,))}


@pytest.fixture(autouse=True)
def closes_what_it_opens(tmp_path: Path) -> Iterator[None]:
    """No descriptor under the test's folder is left open, whatever failed."""
    yield
    left = []
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}"):
            left.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert [target for target in left if target.startswith(str(tmp_path))] == []


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = tuple(
        write_folder(tmp_path / name, random_tensors(SHAPES, seed), 2) for seed, name in enumerate(("sft", "al"))
    )
    before = fingerprint(*made)
    yield made[0], made[1]
    assert fingerprint(*made) == before


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def created(path: Path, size: int) -> ShardWriter:
    """A writer of a whole new file."""
    create_shard(str(path), size)
    return ShardWriter(str(path), size, size)


def write_all(path: Path, data: bytes, chunk: int = PAGE, threads: int = 1) -> ShardWriter:
    """Write data through a ShardWriter, in chunks and by several threads."""
    writer = created(path, len(data))
    starts = iter(range(0, len(data), chunk))
    failures: list[BaseException] = []

    def work() -> None:
        buffer = page_aligned(chunk)
        try:
            for start in starts:
                length = min(chunk, len(data) - start)
                buffer[:length] = data[start : start + length]
                writer.write(start, buffer, length)
        except BaseException as error:
            failures.append(error)

    try:
        if threads == 1:
            work()
        else:
            crew = [threading.Thread(target=work) for _ in range(threads)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
    finally:
        writer.close()
    if failures:
        raise failures[0]
    return writer


# --- ShardWriter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 100_001])
@pytest.mark.parametrize("chunk", [4096, 16384])
def test_the_file_is_what_was_written_to_the_byte(tmp_path: Path, size: int, chunk: int) -> None:
    write_all(tmp_path / "file", content(size), chunk)
    assert (tmp_path / "file").read_bytes() == content(size)


def test_the_file_has_its_full_size_before_the_first_write(tmp_path: Path) -> None:
    create_shard(str(tmp_path / "file"), 123_457)
    assert (tmp_path / "file").stat().st_size == 123_457


def test_a_file_that_is_there_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(expo.OutputError, match=f"{tmp_path}/file: File exists"):
        create_shard(str(tmp_path / "file"), 4096)
    assert (tmp_path / "file").read_text() == "mine"


def refuse_to_sync(monkeypatch: pytest.MonkeyPatch, times: int, name: str = "") -> None:
    """The first syncs of files with this in their names fail: what could not be written is forgotten, and no later
    sync fails for it."""
    real, calls = os.fsync, itertools.count()

    def fsync(fd: int) -> None:
        if name in os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) and next(calls) < times:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_after_a_sync_that_failed_none_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_sync(monkeypatch, 1)
    buffer = page_aligned(2 * PAGE)
    with contextlib.closing(created(tmp_path / "file", 2 * PAGE)) as writer:
        writer.sync()  # nothing is written yet
        writer.write(0, buffer, PAGE)
        for _ in range(2):
            with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
                writer.sync()
        with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
            writer.write(PAGE, buffer, PAGE)
    with pytest.raises(expo.OutputError, match=f"^{tmp_path}/file: Input/output error$"):
        writer.sync()


def test_what_a_sync_failed_for_is_not_gone_on_with(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, name = tmp_path / "out", "model-00002-of-00002.safetensors"
    with monkeypatch.context() as patch:
        refuse_to_sync(patch, 1, name)
        with pytest.raises(expo.OutputError, match=rf"{name}: Input/output error; what is done is kept in"):
            expo.merge(*pair, 0.3, out)
    found = expo.output.journal.read_journal(expo.output.journal.journal_path(str(staging_folder(out))))
    assert found is not None
    assert name not in {shard for shard, _ in found.done}
    expo.merge(*pair, 0.3, out, resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert contents(out) == contents(tmp_path / "plain")


def test_a_file_that_is_whole_already_is_cut_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "file", content(PAGE + 5)
    path.write_bytes(data + b"the rest of the last block")
    refuse_to_sync(monkeypatch, 1)
    with pytest.raises(expo.OutputError, match=f"^{path}: Input/output error$"):
        create_shard(str(path), len(data), len(data))
    create_shard(str(path), len(data), len(data))
    assert path.read_bytes() == data


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def fake(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", fake)


def refuse_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def fake(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fake)


def refuse_at_third_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, itertools.count()

    def fake(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT and next(calls) >= 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fake)


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.output.direct_io, "O_DIRECT", 0)


REFUSALS = [refuse_at_open, refuse_at_write, refuse_at_third_write, no_direct]


@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_filesystem_without_o_direct_gets_buffered_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None], threads: int
) -> None:
    data = content(50 * PAGE + 17)
    refuse(monkeypatch)
    writer = write_all(tmp_path / "file", data, threads=threads)
    assert not writer.direct
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("refuse", REFUSALS)
def test_a_merge_without_o_direct_says_so(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    expo.merge(*pair, 0.3, tmp_path / "plain")
    refuse(monkeypatch)
    assert not expo.merge(*pair, 0.3, tmp_path / "out", verify=True).direct or refuse is refuse_at_third_write
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "plain")


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 1000, 1])
@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, direct: bool) -> None:
    real = os.pwrite
    if not direct:
        no_direct(monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:most], offset))
    data = content(4 * PAGE + 5)
    write_all(tmp_path / "file", data, chunk=2 * PAGE)
    assert (tmp_path / "file").read_bytes() == data


@contextlib.contextmanager
def c_library_whose(function: str, code: int | None) -> Iterator[None]:
    """A C library whose function fails with this errno, or that has no such function."""

    def fail(*_: Any) -> int:
        ctypes.set_errno(code or 0)
        return -1

    library = SimpleNamespace(**({function: fail} if code else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: library)
        yield


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None])
def test_a_filesystem_that_cannot_allocate_gets_a_file_with_holes(tmp_path: Path, code: int | None) -> None:
    with c_library_whose("fallocate64", code):
        write_all(tmp_path / "file", content(9999))
    assert (tmp_path / "file").read_bytes() == content(9999)


# --- every call fails once --------------------------------------------------------------------------------------------

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS]
CALLS = ["open", "pwrite", "fsync", "ftruncate", "rename", "mkdir", "link", "unlink", "allocate", "open()", "journal"]


class Fault:
    """The k-th call of one function fails once, with an OSError; the others go through, and those on the inputs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, k: int, code: int) -> None:
        self.hit = False
        self._calls = itertools.count()
        self._k = k
        self._error = OSError(code, os.strerror(code))
        if call == "allocate":
            monkeypatch.setattr(expo.output.direct_io, call, self._wrap(expo.output.direct_io.allocate))
        elif call in ("open()", "journal"):
            module = expo.output.atomic if call == "open()" else expo.output.journal
            monkeypatch.setattr(module, "open", self._wrap(open), raising=False)
        else:
            monkeypatch.setattr(os, call, self._wrap(getattr(os, call)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*arguments: Any, **named: Any) -> Any:
            inside_an_input = isinstance(arguments[0], str) and {"sft", "al"} & set(Path(arguments[0]).parts)
            cleaning_up = sys._getframe(1).f_code.co_filename == shutil.__file__
            if not inside_an_input and not cleaning_up and next(self._calls) == self._k:
                self.hit = True
                raise self._error
            return real(*arguments, **named)

        return fake


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_any_call_may_fail_and_what_is_done_is_left_or_nothing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """A folder and a bare file, in a folder that has to be made: there and complete, or all of it to go on with."""
    files = tuple(sorted(place.glob("*.safetensors"))[0] for place in pair)
    failures = [fail_every_call(inputs, tmp_path, monkeypatch, call, code) for inputs in (pair, files)]
    assert any(failures)


def fail_every_call(
    inputs: tuple[Path, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> int:
    """Merge again and again, with the first call failing, then the second, until none fails; how many did."""
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
            if fault.hit and call == "fsync":  # of the parent: the output is in place, so it is not called missing
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
    """Whether the staging folder was left, and it alone, and the message says so; else nothing at all was left."""
    left = sorted(os.listdir(out.parent)) if out.parent.exists() else None
    if "--resume" not in said:
        assert left is None, f"call {k} failed and left {left}"
        return False
    assert left == [staging_folder(out).name], f"call {k} failed and left {left}"
    assert said.endswith(f"; {kept(out)}")
    assert said.count("--resume") == 1
    return True


def attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returned, or what it raised."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def remove(place: Path) -> None:
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()


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
            assert left == ([staging_folder(out).name] if "--resume" in str(error) else []), f"call {k} failed"
            assert not left or str(error).endswith(f"; {kept(out)}")
            merge(resume=True)
            left = sorted({*os.listdir(tmp_path)} - {"al", "out", "sft"})
        elif left:  # what could not be removed after all is in place
            assert any(str(tmp_path / left[0]) in warning for warning in merged.warnings)
            (tmp_path / left.pop()).unlink()
        assert left == [], f"after call {k} failed"
        assert contents(out) == new, f"after call {k} failed"
        remove(out)
        if not fault.hit:
            break


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


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    if not exchange(str(tmp_path / "one"), str(tmp_path / "two")):
        pytest.skip("this filesystem cannot swap two folders")
    assert os.listdir(tmp_path / "one") == ["was-two"]
    assert os.listdir(tmp_path / "two") == ["was-one"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_exchange_says_where_the_system_cannot(code: int | None) -> None:
    with c_library_whose("renameat2", code):
        assert exchange("a", "b") is False


def test_exchange_raises_what_is_no_lack_of_support(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(str(tmp_path / "one"), str(tmp_path / "two"))


# --- real limits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a tmpfs with the given options; skips where this process may not mount."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this process may not mount a filesystem: {error}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("fallocates", [True, False])
def test_a_disk_that_is_full(mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fallocates: bool) -> None:
    place = mounted("size=256k")
    if not fallocates:
        monkeypatch.setattr(expo.output.direct_io, "allocate", os.ftruncate)
    with pytest.raises(expo.OutputError, match=rf"{place}/file: No space left on device; free some space or choose"):
        write_all(place / "file", content(1 << 20))


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
    monkeypatch.setattr(expo.merging.merge, "free_bytes", lambda _: 1 << 40)
    if not fallocates:
        monkeypatch.setattr(expo.output.direct_io, "allocate", os.ftruncate)
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(*pair, 0.3, place / "out")
    assert "No space left on device; free some space or choose another --out; " in str(caught.value)
    assert str(caught.value).endswith(f"; {kept(place / 'out')}")
    assert os.listdir(place) == [staging_folder(place / "out").name]
    subprocess.run(["mount", "-o", "remount,size=1m", str(place)], check=True)
    expo.merge(*pair, 0.3, place / "out", resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert os.listdir(place) == ["out"]
    assert contents(place / "out") == contents(tmp_path / "plain")


def test_a_read_only_filesystem(pair: Pair, mounted: Callable[[str], Path]) -> None:
    place = mounted("ro")
    message = f"{place}.*: Read-only file system; the filesystem is read-only: choose another --out"
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
    assert "File too large; the filesystem or a limit (ulimit -f) refuses files of this size; what" in done.stderr
    assert done.stderr.endswith(f"; {kept(tmp_path / 'out')}\n")
    assert sorted(os.listdir(tmp_path)) == [".out.expo-staging", "al", "sft"]
    expo.merge(*pair, 0.3, tmp_path / "out", resume=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path)) == ["al", "out", "plain", "sft"]


# --- Staging ----------------------------------------------------------------------------------------------------------

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
    with pytest.raises(expo.OutputError, match="was left by an interrupted merge: --resume goes on with it, --overwr"):
        Staging(out, False, False)
    for overwrite in (False, True):
        with Staging(out, False, overwrite, True):  # for whoever goes on with it, and it stays
            assert os.listdir(tmp_path / ".out.expo-staging") == ["half.json"]
    with Staging(out, False, True) as staging:
        assert os.listdir(staging.folder) == []
    assert os.listdir(tmp_path) == []


def test_of_two_that_start_at_the_same_moment_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other takes the lock on the folder between the making of it and the locking."""
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
        assert os.listdir(tmp_path) == [".out.expo-staging"]  # it is the other's
    finally:
        os.close(others[0])


def test_what_is_cleaned_up_after_a_commit_is_not_anothers(tmp_path: Path) -> None:
    """Between a commit and the end of its merge, another may begin to overwrite the output."""
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
    assert events[0] == journal  # whose merge it is
    assert events[1:3] == [".out.expo-staging", tmp_path.name]  # the names that the journal will vouch for
    assert sorted(events[3:5]) == shards
    assert events[5:] == [
        journal, "config.json", "README.md", index, "rename", ".out.expo-staging", "rename", tmp_path.name
    ]  # fmt: skip


def test_a_bare_file_on_a_filesystem_without_hard_links(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename does it there, unless the name has been taken meanwhile."""
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
    """Under staging's name it would look like a leftover, which another merge might take over."""
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
    """The model that was replaced is removed all the same, and nobody is told that nothing has happened."""
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
    with monkeypatch.context() as patch:
        patch.setattr(expo.merging.merge, "free_bytes", lambda _: 0)  # what is left has room already
        expo.merge(*pair, [0.1, 0.3], tmp_path / "out{alpha}", resume=True, verify=True)
    assert sorted(os.listdir(tmp_path)) == ["al", "out0.1", "out0.3", "sft"]
    assert fingerprint(first) == before
    expo.merge(*pair, [0.1, 0.3], tmp_path / "plain{alpha}")
    assert contents(first) == contents(tmp_path / "plain0.1")
    assert contents(second) == contents(tmp_path / "plain0.3")
