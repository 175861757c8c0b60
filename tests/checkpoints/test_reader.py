"""Reading an input that other processes change: all bytes, or an error that names the file, and never a signal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import fingerprint, random_tensors, sparse_file, staging_folder, write_folder

import expo
from expo.checkpoints import reader as module
from expo.checkpoints.reader import FileReader, Identity, filesystem_type
from expo.errors import CheckpointError
from expo.execution.engines import Engine, choose

ROOT = Path(__file__).parents[2]
PAGE = mmap.PAGESIZE
SIZE = 5 * PAGE + 77
CONTENT = np.random.default_rng(SIZE).bytes(SIZE)
RANGES = [
    (0, SIZE), (0, 1), (SIZE - 1, SIZE), (PAGE - 1, PAGE + 1), (PAGE, 2 * PAGE), (3, 3), (0, 0), (SIZE, SIZE),
    (1234, 4 * PAGE + 5),
]  # fmt: skip


@pytest.fixture(autouse=True)
def leaves_nothing_open(frozen_heap: None, tmp_path: Path) -> Iterator[None]:
    """Assert after each test that no descriptor and no mapping outlives its reader."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # objects that an exception refers to are freed with it
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@pytest.fixture
def reader(path: Path) -> Iterator[FileReader]:
    """Return a reader whose file is not open yet."""
    with contextlib.closing(FileReader(str(path), identity(path))) as made:
        yield made


@pytest.fixture
def leased(reader: FileReader) -> FileReader:
    """Return a reader that has its file mapped; skip the test if the system grants no lease."""
    with reader.mapped(0, 1) as view:
        if view is None:
            pytest.skip("this filesystem grants no read lease")
    return reader


@pytest.fixture
def unmapped(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> FileReader:
    """Return a reader that does not map its file, as on a network filesystem."""
    monkeypatch.setattr(module, "LOCAL", set())
    return reader


def identity(path: Path) -> Identity:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Identity.of(fd)
    finally:
        os.close(fd)


def take(reader: FileReader, start: int = 0, stop: int = SIZE) -> bytes:
    """Return bytes [start, stop) by `read`."""
    into = bytearray(stop - start)
    reader.read(start, into)
    return bytes(into)


def peek(reader: FileReader, start: int = 0, stop: int = SIZE) -> bytes | None:
    """Return bytes [start, stop) of the mapping; None if there is no mapping."""
    with reader.mapped(start, stop) as view:
        return None if view is None else bytes(view)


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_read_fills_a_buffer_from_any_byte_on(reader: FileReader, start: int, stop: int) -> None:
    assert take(reader, start, stop) == CONTENT[start:stop]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f8"])
def test_read_fills_memory_of_any_kind(reader: FileReader, dtype: str) -> None:
    into = np.zeros(64, dtype)
    reader.read(5, into)
    assert into.tobytes() == CONTENT[5 : 5 + into.nbytes]


@pytest.mark.parametrize("most", [1, 7, PAGE, SIZE])
def test_a_short_read_is_carried_on(reader: FileReader, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:most]], at))
    assert take(reader, 3, PAGE + 9) == CONTENT[3 : PAGE + 9]


def test_a_read_that_signals_interrupt_is_carried_on(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler runs in a read and between two; Python repeats a call that a signal interrupts."""
    real, heard = os.preadv, []

    def interrupted(fd: int, views: Any, at: int) -> int:
        signal.raise_signal(signal.SIGUSR1)
        return real(fd, [views[0][:1000]], at)

    before = [signal.signal(number, lambda *_: heard.append(1)) for number in (signal.SIGUSR1, signal.SIGALRM)]
    monkeypatch.setattr(os, "preadv", interrupted)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    try:
        assert all(take(reader) == CONTENT for _ in range(50))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGUSR1, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    assert len(heard) > 50 * SIZE // 1000


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_names_the_file_and_the_byte(
    reader: FileReader, path: Path, monkeypatch: pytest.MonkeyPatch, good: int, code: int
) -> None:
    real, calls = os.preadv, []

    def failing(fd: int, views: Any, at: int) -> int:
        calls.append(at)
        if len(calls) > good:
            raise OSError(code, os.strerror(code))
        return real(fd, [views[0][:100]], at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError) as caught:
        take(reader, 11)
    assert str(caught.value) == f"{path}: {os.strerror(code)} at byte {11 + 100 * good}"


def test_many_threads_share_one_descriptor(unmapped: FileReader, path: Path) -> None:
    barrier, found = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        found.append(take(unmapped))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8
    assert list(map(os.path.realpath, open_files())).count(str(path)) == 1


def open_files() -> list[str]:
    return [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize(("start", "stop"), [*RANGES, (9000, 100), (0, 10 * SIZE)])
def test_reading_ahead_changes_no_byte(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch, start: int, stop: int
) -> None:
    reader.read_ahead(start, stop)
    assert take(reader) == CONTENT

    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    reader.read_ahead(start, stop)
    monkeypatch.delattr(os, "posix_fadvise")
    reader.read_ahead(start, stop)
    assert take(reader) == CONTENT


def seconds(action: Callable[[], Any]) -> float:
    """Return how many seconds the action takes: 45 for a write that waits for a lease that does not end."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


# --- a file that changes before the first read ------------------------------------------------------------------------


def shrink(path: Path) -> None:
    os.truncate(path, PAGE + 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    """Put a copy with the same bytes and times in the file's place, as a second download does."""
    times = path.stat()
    path.with_name("other").write_bytes(CONTENT)
    os.utime(path.with_name("other"), ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(path.with_name("other"), path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def overwrite(path: Path) -> None:
    """Write other bytes into the file, as many as before."""
    with path.open("r+b") as file:
        file.write(b"other bytes")
    touch(path)


def by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = [shrink, grow, replace, touch, overwrite, by_a_folder]
WAYS: list[Callable[[FileReader], Any]] = [take, peek, lambda reader: reader.read_ahead(0, 10)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS, ids=["read", "mapped", "ahead"])
def test_a_file_that_changes_before_it_is_read(
    reader: FileReader, path: Path, change: Callable[[Path], None], way: Callable[[FileReader], Any]
) -> None:
    change(path)
    size = path.stat().st_size
    with pytest.raises(CheckpointError) as caught:
        way(reader)
    assert str(caught.value) == (
        f"{path}: {size} bytes now; it is being changed, and had {SIZE} bytes when its header was "
        "read: let no process change the file, and try again"
    )


@pytest.mark.parametrize("way", WAYS, ids=["read", "mapped", "ahead"])
def test_a_file_that_is_gone_before_it_is_read(
    reader: FileReader, path: Path, way: Callable[[FileReader], Any]
) -> None:
    path.unlink()
    with pytest.raises(CheckpointError, match=f"^{path}: No such file or directory$"):
        way(reader)


def test_a_fifo_in_the_place_of_the_file_is_not_waited_for(reader: FileReader, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    found: list[BaseException] = []

    def read() -> None:
        try:
            take(reader)
        except CheckpointError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(3)
    if thread.is_alive():  # a writer that closes the FIFO ends the thread
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join()
        pytest.fail("the read does not end")
    assert str(path) in str(found[0])


# --- a file that changes between two reads ----------------------------------------------------------------------------


def test_a_file_that_nobody_changes_passes_the_check(reader: FileReader) -> None:
    reader.check()  # the file is not open yet
    take(reader)
    reader.check()


def test_a_file_that_shrinks_between_two_reads(unmapped: FileReader, path: Path) -> None:
    assert take(unmapped) == CONTENT
    shrink(path)
    assert take(unmapped, 0, PAGE) == CONTENT[:PAGE]  # the bytes of now are read, and `check` reports the change
    with pytest.raises(CheckpointError) as caught:
        take(unmapped, 10)
    was = f"and had {SIZE} bytes when its header was read: let no process change the file, and try again"
    assert str(caught.value) == f"{path}: it ends at byte {PAGE + 1} now, {was}"
    with pytest.raises(CheckpointError, match=f"^{path}: it was changed while it was read, {was}$"):
        unmapped.check()


@pytest.mark.parametrize("change", [grow, touch, overwrite])
def test_a_file_that_is_changed_between_two_reads_fails_the_check(
    unmapped: FileReader, path: Path, change: Callable[[Path], None]
) -> None:
    assert take(unmapped) == CONTENT
    change(path)
    take(unmapped)
    with pytest.raises(CheckpointError, match=f"^{path}: it was changed while it was read, and had {SIZE} bytes"):
        unmapped.check()


@pytest.mark.parametrize("change", [replace, Path.unlink])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_open_may_be_replaced_or_removed(
    reader: FileReader, path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], mapped: bool
) -> None:
    """The reader gives the bytes of the file whose header was read."""
    if not mapped:
        monkeypatch.setattr(module, "LOCAL", set())
    take(reader)
    change(path)
    assert take(reader) == CONTENT
    assert peek(reader) in (CONTENT, None)
    reader.check()


# --- mapped -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_mapping_has_the_bytes_of_a_read(leased: FileReader, start: int, stop: int) -> None:
    for _ in range(2):  # pages that were released are mapped again
        assert peek(leased, start, stop) == take(leased, start, stop) == CONTENT[start:stop]
        assert peek(leased) == CONTENT


def test_a_mapping_of_whole_pages_has_an_end_too(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(CONTENT[: 2 * PAGE])
    with contextlib.closing(FileReader(str(path), identity(path))) as reader:
        assert peek(reader, 2 * PAGE, 2 * PAGE) in (b"", None)
        assert peek(reader, PAGE, 2 * PAGE) in (CONTENT[PAGE : 2 * PAGE], None)


def test_a_mapping_is_read_only(leased: FileReader) -> None:
    with leased.mapped(0, 10) as view:
        assert view is not None
        assert view.readonly


def test_pages_are_let_go_after_use(leased: FileReader, path: Path) -> None:
    with leased.mapped(0, SIZE) as view:
        assert sum(view or b"") == sum(CONTENT)
        assert resident(path) >= SIZE
    assert resident(path) == 0


def test_a_long_file_in_pieces_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """A page fault maps neighbours of the page too, also those of a piece that was released."""
    path = tmp_path / "long"
    piece, pieces = (1 << 20) + PAGE, 64
    with open(path, "wb") as file:
        file.truncate(piece * pieces)
    with contextlib.closing(FileReader(str(path), identity(path))) as reader:
        for number in range(pieces):
            with reader.mapped(number * piece, (number + 1) * piece) as view:
                if view is None:
                    pytest.skip("no lease can be had here")
                assert not any(bytes(view)[::PAGE])
        assert resident(path) == 0


def resident(path: Path) -> int:
    """Return the bytes of the file's mapping that count as this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(line for line in lines[i:] if line.startswith("Rss:")).split()[1]) * 1024 for i in starts)


def refused(code: int) -> Callable[..., int]:
    """Raise the error of fcntl() on a filesystem without leases."""
    real = fcntl.fcntl

    def fake(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(code, os.strerror(code))
        return real(fd, command, *rest)

    return fake


REFUSALS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a network filesystem": lambda patch: patch.setattr(module, "filesystem_type", lambda _: "nfs4"),
    "an unknown filesystem": lambda patch: patch.setattr(module, "filesystem_type", lambda _: ""),
    "a system without leases": lambda patch: patch.delattr(fcntl, "F_SETLEASE"),
    "another user's file": lambda patch: patch.setattr(fcntl, "fcntl", refused(errno.EACCES)),
    "open for writing": lambda patch: patch.setattr(fcntl, "fcntl", refused(errno.EAGAIN)),
    "leases switched off": lambda patch: patch.setattr(fcntl, "fcntl", refused(errno.EINVAL)),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_without_a_lease_nothing_is_mapped_and_all_is_read(
    reader: FileReader, path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    with monkeypatch.context() as patch:
        REFUSALS[why](patch)
        assert peek(reader) is None
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert take(reader) == CONTENT
        reader.answer_lease_break()
        reader.check()
        reader.close()


def test_a_file_that_somebody_has_open_for_writing_is_not_mapped(reader: FileReader, path: Path) -> None:
    with path.open("r+b"):
        assert peek(reader) is None
        assert take(reader) == CONTENT


def test_a_mapping_that_the_system_refuses_gives_the_lease_back(
    reader: FileReader, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("expo.checkpoints.reader.mmap.mmap", refuse)
    assert peek(reader) is None
    assert take(reader) == CONTENT
    assert seconds(lambda: grow(path)) < 5


def test_a_file_that_shrinks_just_before_the_lease_is_not_mapped(
    reader: FileReader, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def late(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETLEASE and rest == (fcntl.F_RDLCK,):
            shrink(path)
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", late)
    assert peek(reader) is None
    with pytest.raises(CheckpointError, match=f"{path}: it ends at byte {PAGE + 1} now"):
        take(reader)


def test_the_type_of_a_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert filesystem_type(os.stat("/proc").st_dev) == "proc"
    assert filesystem_type(os.makedev(4095, 4095)) == ""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    assert filesystem_type(os.stat("/proc").st_dev) == ""


# --- a process that writes --------------------------------------------------------------------------------------------

TRUNCATES = "import os, sys; os.truncate(sys.argv[1], 10)"
WRITES = "import sys; open(sys.argv[1], 'r+b').write(b'other bytes')"
APPENDS = "import sys; open(sys.argv[1], 'ab').write(b'x')"


@contextlib.contextmanager
def writer(code: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that changes the file, and yield after 0.2 s, when it may wait for the end of the lease."""
    process = subprocess.Popen([sys.executable, "-c", f"import sys; print(flush=True); {code}", str(path)], stdout=-1)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("code", [TRUNCATES, WRITES, APPENDS])
def test_a_writer_waits_until_the_reader_ends_the_lease(leased: FileReader, path: Path, code: str) -> None:
    with contextlib.ExitStack() as stack:
        with leased.mapped(0, SIZE) as view:
            process = stack.enter_context(writer(code, path))
            assert process.poll() is None
            leased.answer_lease_break()  # a view is still in use
            assert view == CONTENT
            assert process.poll() is None
        assert process.wait(10) == 0  # the end of the block ended the lease
    assert peek(leased) is None
    if code == TRUNCATES:
        with pytest.raises(CheckpointError, match=f"{path}: it ends at byte 10 now"):
            take(leased)
    with pytest.raises(CheckpointError, match=f"{path}: it was changed while it was read"):
        leased.check()


@pytest.mark.parametrize("code", [TRUNCATES, WRITES])
def test_a_mapping_that_is_not_in_use_ends_when_it_is_asked_to(leased: FileReader, path: Path, code: str) -> None:
    with writer(code, path) as process:
        assert process.poll() is None
        leased.answer_lease_break()
        assert process.wait(10) == 0
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_mapping_that_is_not_in_use_ends_at_its_next_use(leased: FileReader, path: Path) -> None:
    with writer(APPENDS, path) as process:
        assert process.poll() is None
        assert peek(leased) is None
        assert process.wait(10) == 0


def test_no_use_begins_while_a_writer_waits_and_the_last_to_end_unmaps(leased: FileReader, path: Path) -> None:
    """Two threads use the mapping when the writer opens the file."""
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]
    found: list[bool] = []

    def use(k: int) -> None:
        with leased.mapped(0, SIZE) as view:
            inside.wait(10)
            leave[k].wait(10)
            found.append(view == CONTENT)

    threads = [threading.Thread(target=use, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    with writer(TRUNCATES, path) as process:
        assert peek(leased) is None
        leave[0].set()
        threads[0].join()
        leased.answer_lease_break()
        time.sleep(0.1)
        assert process.poll() is None
        leave[1].set()
        threads[1].join()
        assert process.wait(10) == 0
    assert found == [True, True]


def test_an_error_while_a_mapping_is_in_use_ends_the_lease_too(leased: FileReader, path: Path) -> None:
    """The traceback refers to a view of the mapping as long as it exists."""
    with writer(TRUNCATES, path) as process:

        def fail() -> None:
            with leased.mapped(0, SIZE) as view:
                assert view is None
                raise RuntimeError("the engine failed")

        with pytest.raises(RuntimeError, match="the engine failed"):
            fail()
        assert process.wait(10) == 0


# --- close ------------------------------------------------------------------------------------------------------------


def test_close_is_a_no_op_where_nothing_is_open_and_reading_works_again_after_it(reader: FileReader) -> None:
    reader.close()
    reader.answer_lease_break()
    for _ in range(2):
        assert take(reader) == CONTENT
        assert peek(reader) in (CONTENT, None)
        reader.close()
        reader.close()
        reader.answer_lease_break()
        reader.check()


def test_close_while_there_is_a_view_hides_no_other_error(leased: FileReader, path: Path) -> None:
    """The traceback of an error in the arithmetic refers to views when `closing` ends."""

    def fail() -> None:
        with contextlib.closing(leased), leased.mapped(8, 16) as view:
            assert view is not None
            raise RuntimeError(f"the engine failed on {len(view)} bytes")

    with pytest.raises(RuntimeError, match="the engine failed on 8 bytes"):
        fail()
    assert seconds(lambda: grow(path)) < 5
    with pytest.raises(CheckpointError, match="it is being changed"):
        take(leased)


# --- a whole merge ----------------------------------------------------------------------------------------------------

# A merge that reports on stderr when it is half done, and is slow from then on.
MERGE = """
import sys, time
import expo.merging.merge, expo.checkpoints.reader
from expo.execution.engines import Engine, choose
from expo.fast import main

if sys.argv.pop(1) == "unmapped":
    expo.checkpoints.reader.LOCAL = set()
calls = 0

def run(*arguments):
    global calls
    calls += 1
    if calls == 4:
        print("now", file=sys.stderr, flush=True)
    if calls >= 4:
        time.sleep(0.1)
    return choose().run(*arguments)

expo.merging.job.engines_for = lambda *_: (Engine("slow", run, "a test"),) * 2
sys.exit(main())
"""
TENTH = "import os, sys; os.truncate(sys.argv[1], os.path.getsize(sys.argv[1]) // 10)"


@pytest.mark.parametrize("how", ["mapped", "unmapped"])
@pytest.mark.parametrize(("code", "which"), [(TENTH, "sft"), (TENTH, "aligned"), (WRITES, "sft"), (APPENDS, "aligned")])
def test_an_input_that_another_process_changes_in_the_middle_of_a_merge(
    tmp_path: Path, how: str, code: str, which: str
) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {f"w{i}": ("BF16", (2048, 4096)) for i in range(2)}
    pair = [sparse_file(tmp_path / f"{name}.safetensors", shapes) for name in ("sft", "aligned")]
    changed, out = tmp_path / f"{which}.safetensors", tmp_path / "out.safetensors"
    options = ["--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3", "--out", str(out), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE, how, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n"
    waited = seconds(lambda: subprocess.run([sys.executable, "-c", code, str(changed)], check=True))
    printed, said = process.communicate(timeout=60)
    left = [path.name for path in tmp_path.iterdir() if path not in pair]
    shutil.rmtree(staging_folder(out), ignore_errors=True)  # the file is as large as the output
    assert (process.returncode, printed) == (3, "")
    assert said.startswith(f"expo: error: {changed}: it ")
    assert said.count("\n") == 1
    assert left == [staging_folder(out).name]
    assert waited < 5  # the merge ended the lease long before the system would have ended it


def test_a_writer_to_an_input_that_is_read_already_does_not_wait_for_the_merge_to_end(
    leased: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("BF16", (64,)), "b": ("BF16", (100, 1024))}
    pair = [write_folder(tmp_path / name, random_tensors(shapes, 1), 2) for name in ("sft", "aligned")]
    first = pair[0] / "model-00001-of-00002.safetensors"
    engine = choose()

    def slow(*arguments: Any) -> Any:
        time.sleep(0.04)
        return engine.run(*arguments)

    monkeypatch.setattr("expo.merging.job.engines_for", lambda *_: (Engine("slow", slow, "a test"),))
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 4096)
    waiting: list[bool] = []
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []

        def write(done: int, total: int) -> None:
            if not processes and 5 * done > total:
                processes.append(stack.enter_context(writer(APPENDS, first)))
            waiting.extend(process.poll() is None for process in processes)

        with pytest.raises(CheckpointError, match=f"^{first}: it was changed while it was read"):
            expo.merge(*pair, 0.3, tmp_path / "out", progress=write)
        assert waiting[0]
        assert not waiting[-1]


@pytest.mark.parametrize("verify", [False, True])
def test_a_merge_gives_the_same_bytes_and_numbers_unmapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Tensors have more than one block, and in some cases only one of the two inputs is mapped."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("BF16", (700, 301)), "b": ("F32", (500, 301))}
    sft_shapes: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("F64", (700, 301)), "b": ("F16", (500, 301))}
    pair = (
        write_folder(tmp_path / "sft", random_tensors(sft_shapes, 1), pad=3),
        write_folder(tmp_path / "aligned", random_tensors(shapes, 2), pad=1),
    )
    plain = expo.merge(*pair, [0.3, 0.0], tmp_path / "plain{alpha}")
    open_for_writing = (pair[0] / "model.safetensors").open("r+b")
    with open_for_writing:
        half = expo.merge(*pair, [0.3, 0.0], tmp_path / "half{alpha}", verify=verify)
    monkeypatch.setattr(module, "LOCAL", set())
    unmapped = expo.merge(*pair, [0.3, 0.0], tmp_path / "unmapped{alpha}", verify=verify)
    for merged, name in ((half, "half"), (unmapped, "unmapped")):
        assert merged.max_abs_difference == plain.max_abs_difference
        assert merged.relative_distance == pytest.approx(plain.relative_distance, rel=1e-12)
        for k, alpha in enumerate(("0.3", "0")):
            ours, theirs = merged.outputs[k], plain.outputs[k]
            assert (ours.changed, ours.non_finite) == (theirs.changed, theirs.non_finite)
            found, wanted = (fingerprint(tmp_path / f"{place}{alpha}") for place in (name, "plain"))
            assert list(found.values()) == list(wanted.values())
