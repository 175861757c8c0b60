"""Writing an output: shards with O_DIRECT where the filesystem takes it, in a staging folder that is committed whole.

Nothing stands at the output's path before `Staging.commit`: shards are written and synced in a hidden folder
beside it, the index last, and one rename puts the folder (or the one file) in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Container, Iterable, Iterator

from ..errors import OutputError
from ..memory import PAGE
from .mounts import refuse_mount_point

EXCHANGE = 2  # renameat2's RENAME_EXCHANGE
JOURNAL = ".expo-journal"  # in staging: see journal.py
DIGEST = ".sha256"  # of an output that is one file: its name in staging, and what its name beside the output ends in
O_DIRECT = getattr(os, "O_DIRECT", 0)


@contextlib.contextmanager
def output_errors(path: str) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the path and the fix."""
    try:
        yield
    except OSError as error:
        fixes = {
            errno.ENOSPC: "free some space or choose another --out",
            errno.EDQUOT: "free some of your quota or choose another --out",
            errno.EACCES: "choose an --out that you may write to",
            errno.EPERM: "choose an --out that you may write to",
            errno.EROFS: "the filesystem is read-only: choose another --out",
            errno.EFBIG: "the filesystem or a limit (ulimit -f) refuses files of this size",
        }
        fix = fixes.get(error.errno or 0)
        raise OutputError(f"{path}: {error.strerror or error}" + (f"; {fix}" if fix else "")) from error


def create_shard(path: str, size: int, durable: int = 0) -> None:
    """Create an output file with its full size, or go on with one that has `durable` bytes. Raises OutputError.

    It is allocated at once: a full disk shows early, and writes into allocated blocks run in parallel.
    """
    with output_errors(path):
        flags = 0 if durable else os.O_CREAT | os.O_EXCL
        fd = os.open(path, flags | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
        try:
            if durable and os.fstat(fd).st_size < size:
                raise OutputError(f"{path} is shorter than it was left: --overwrite starts anew")
            allocate(fd, size)
            if durable == size:  # its last block was written whole, and perhaps not cut off any more
                os.ftruncate(fd, size)
                os.fsync(fd)
        finally:
            os.close(fd)


class ShardWriter:
    """One output file, written in chunks by any number of threads, synced and closed with the last of them."""

    def __init__(self, path: str, size: int, missing: int) -> None:
        """A file that is there. size: its bytes in the end; missing: of these, how many will be written here."""
        self.path = path
        self.size = size
        self.direct = bool(O_DIRECT)
        self._missing = missing
        self._lock = threading.Lock()
        self._fd = -1
        self._lost: OSError | None = None  # what made a sync fail

    def sync(self) -> None:
        """Make what was written so far durable. Raises OutputError."""
        with output_errors(self.path), self._lock:
            self._fsync()

    def _fsync(self) -> None:
        # The system forgets what it could not write: after a sync that failed, the next one would say that all is well.
        if self._lost is not None:
            raise self._lost
        try:
            if self._fd >= 0:
                os.fsync(self._fd)
        except OSError as error:
            self._lost = error
            raise

    def write(self, offset: int, data: memoryview, length: int) -> None:
        """Write data[:length] at offset, both multiples of 4096 but for the file's end. Raises OutputError.

        data is page-aligned and as long as the next multiple of 4096: the file's last block is written whole and
        cut off afterwards.
        """
        with output_errors(self.path):
            fd = self._open()
            done = 0
            while done < length:
                direct = self.direct  # as it is now: another thread may be the one that learns that it cannot be
                whole = -(-(length - done) // PAGE) * PAGE if direct else length - done
                try:
                    done += os.pwrite(fd, data[done : done + whole], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    fd = self._reopen_buffered()
            with self._lock:
                self._missing -= length
                last = self._missing == 0
            if last:
                self._finish()

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = os.open(self.path, os.O_WRONLY | (O_DIRECT if self.direct else 0))
                except OSError as error:
                    if error.errno != errno.EINVAL:  # a filesystem without O_DIRECT, some network ones among them
                        raise
                    self.direct = False
                    self._fd = os.open(self.path, os.O_WRONLY)
            return self._fd

    def _reopen_buffered(self) -> int:
        """Some filesystems take the flag and refuse the write: drop it on the descriptor that all threads share."""
        with self._lock:
            if self.direct:
                set_direct(self._fd, False)
                self.direct = False
            return self._fd

    def _finish(self) -> None:
        os.ftruncate(self._fd, self.size)
        self._fsync()
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def set_direct(fd: int, direct: bool) -> None:
    """Switch O_DIRECT of an open descriptor. Raises OSError where the filesystem does not take it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | O_DIRECT if direct else flags & ~O_DIRECT)


def read_back(path: str, start: int, memory: memoryview) -> int:
    """Fill page-aligned memory from `start`, both multiples of 4096, from the device where O_DIRECT can.

    Returns how many bytes there were. Raises OutputError.
    """
    done, length = 0, len(memory)
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            # Set on the open descriptor: a filesystem without it refuses here, and not in the middle.
            with contextlib.suppress(OSError):
                set_direct(fd, True)
            while done < length:
                try:
                    count = os.preadv(fd, [memory[done:]], start + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT:
                        raise
                    set_direct(fd, False)
                    continue
                if not count:
                    break
                done += count
        finally:
            os.close(fd)
    return done


def allocate(fd: int, size: int) -> None:
    """Give a file its size and, where the filesystem can do so at once, its blocks."""
    # Not os.posix_fallocate: where the filesystem cannot, glibc would write into every block instead.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def check_free(out: str, single_file: bool, overwrite: bool) -> None:
    """Raise OutputError where something stands at `out` that must not be replaced, or cannot be."""
    refuse_mount_point(out, single_file)
    if not os.path.exists(out):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; choose another --out, or --overwrite replaces it")
    if os.path.isdir(out) == single_file:
        kinds = ("file", "folder") if single_file else ("folder", "file")
        raise OutputError(f"{out}: a {kinds[0]} is to be written, but a {kinds[1]} is there; choose another --out")
    with output_errors(out):
        names = os.listdir(out) if not single_file else []
    if names and not any(name.endswith(".safetensors") for name in names):
        raise OutputError(f"{out} is a folder without a model, which --overwrite does not replace")


def staging_folder(out: str) -> str:
    """Where an output is made: hidden, beside it."""
    parent, name = os.path.split(os.path.realpath(out))
    return os.path.join(parent, f".{name}.expo-staging")


def lock(fd: int) -> bool:
    """Lock an open file or folder for this process alone; False where another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # held by another; any other error: a filesystem without locks
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _locked(path: str) -> bool:
    """Whether another process has locked a file."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # over NFS a lock needs a file open for writing
    except OSError:
        return False
    try:
        return not lock(fd)
    finally:
        os.close(fd)


def journals_of_ranks(folder: str) -> list[str]:
    """Names of the journals in a staging folder that are not rank 0's."""
    return sorted(name for name in os.listdir(folder) if name.startswith(f"{JOURNAL}."))


def held(out: str) -> int:
    """Bytes of disk that an interrupted merge's staging folder takes."""
    total = 0
    for place, _, names in os.walk(staging_folder(out)):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


class Staging:
    """The hidden folder beside an output in which it is made; a context that removes it unless committed."""

    def __init__(self, out: str, single_file: bool, overwrite: bool, resume: bool = False) -> None:
        """Create and lock the folder. out: the final path; single_file: commit the one file in it, not the folder.

        A folder that was left is emptied with `overwrite`, and kept as it is with `resume`.
        Raises OutputError where the output exists (without overwrite), the folder is there already, or cannot be made.
        """
        self.out = os.path.realpath(out)
        self.single_file = single_file
        self.overwrite = overwrite
        self.resume = resume
        self.parent = os.path.dirname(self.out)
        self.folder = staging_folder(out)
        self._lock = -1
        self.committed = False
        self._ours = False  # whether what stands at self.folder is this merge's to remove
        self._made: list[str] = []
        check_free(self.out, single_file, overwrite)
        try:
            with output_errors(self.folder):
                self._make_parents()
                self._create()
        except BaseException:
            self._clean_up()
            raise

    def _make_parents(self) -> None:
        parent = self.parent
        while not os.path.exists(parent):
            self._made.append(parent)
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            raise OutputError(f"{self.out}: {parent} is no folder; choose another --out")
        os.makedirs(self.parent, exist_ok=True)

    def _create(self) -> None:
        try:
            os.mkdir(self.folder)
            self._ours = True
        except FileExistsError:
            pass
        found = not self._ours
        if not self._try_lock():
            self._ours = False
            raise OutputError(f"{self.out}: another merge is writing it now, in {self.folder}")
        if found and any(_locked(self.path(name)) for name in journals_of_ranks(self.folder)):
            raise OutputError(f"{self.out}: ranks of an interrupted merge are still stopping: try again in a moment")
        if found and not (self.overwrite or self.resume):
            raise OutputError(
                f"{self.folder} was left by an interrupted merge: --resume goes on with it, --overwrite starts anew"
            )
        self._ours = not (found and self.resume)  # what was found to go on with is not this merge's to remove
        if not self.resume:
            self.clear()

    def clear(self, but: Container[str] = ()) -> None:
        """Remove what an earlier merge left, but for the files with these names. Raises OSError."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name not in but:
                    os.unlink(entry.path)

    def keep(self) -> None:
        """Leave the folder for a merge that resumes, instead of removing it."""
        self._ours = False

    def discard(self) -> None:
        """Remove the folder after all, unless it was committed."""
        self._ours = not self.committed

    def _try_lock(self) -> bool:
        """Take the lock on the folder, which dies with this process."""
        # Not through a link: what it leads to is not this merge's to empty.
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        return lock(self._lock)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove the folder unless it was committed, parents made for it if they are empty, and let go of the lock."""
        if self._ours:
            shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def put(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a file durably, in a subfolder if the name has one. Raises OutputError."""
        path = self.path(name)
        with output_errors(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())

    def beside(self, parts: Iterable[bytes]) -> None:
        """Stage OUT.sha256, for an output that is one file. Raises OutputError where it exists, without overwrite."""
        path = self.out + DIGEST
        if os.path.lexists(path) and not self.overwrite:
            raise OutputError(f"{path} exists; choose another --out, or --overwrite replaces it")
        self.put(DIGEST, parts)

    def commit(self) -> list[str]:
        """Put the finished output in place: sync the folder, rename, sync the parent.

        Returns warnings: that an old folder could not be replaced in one atomic step, that the digest could not be put
        beside a file, that the parent could not be synced. Raises OutputError.
        """
        warnings: list[str] = []
        with output_errors(self.out):
            for place, _, _ in os.walk(self.folder):
                sync_folder(place)
            source = self.folder
            if self.single_file:
                (name,) = {*os.listdir(self.folder)} - {JOURNAL, DIGEST}
                source = self.path(name)
            if self.overwrite and os.path.isdir(self.out):
                warnings = self._replace_folder()
            elif not self.single_file:
                os.rename(source, self.out)  # refuses a file, and a folder with anything in it, that appeared meanwhile
                self._ours = False
            elif self.overwrite:
                os.rename(source, self.out)
            else:
                _place_new(source, self.out)
            self.committed = True
        if self.single_file:
            self._ours = True  # what is left of it is this merge's to remove, and of one that was gone on with too
            warnings += self._place_digest()
        try:
            for folder in (self.parent, *map(os.path.dirname, self._made)):
                sync_folder(folder)
        except OSError as error:
            warnings.append(f"{self.out} is complete, but may be gone after a power failure: {error.strerror}")
        return warnings

    def _place_digest(self) -> list[str]:
        path = self.out + DIGEST
        try:
            with contextlib.suppress(FileNotFoundError):  # where none was asked for
                os.replace(self.path(DIGEST), path)
        except OSError as error:
            return [f"{self.out} is complete, but {path} could not be written: {error.strerror}"]
        return []

    def _replace_folder(self) -> list[str]:
        """Swap staging and the old output, in one step where the system can, and remove the old one."""
        warnings = []
        old = self.folder
        lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The old output is about to bear staging's name: nobody else may take it.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if exchange(self.folder, self.out):
                self._ours = True  # the old one, where staging was
            else:
                old = f"{self.folder}-old"
                self._swap_in_two_steps(old)
                self._ours = False
                warnings.append(f"{self.out} was replaced in two steps: this filesystem cannot swap folders")
            self.committed = True
            try:
                shutil.rmtree(old)
            except OSError as error:
                warnings.append(f"{old}, the model that was replaced, could not be removed: {error.strerror}")
            self._ours = False  # not before: an interrupted removal is finished by `_clean_up`
        finally:
            os.close(lock)
        return warnings

    def _swap_in_two_steps(self, old: str) -> None:
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except OSError:
            os.rename(old, self.out)
            raise


def _place_new(source: str, out: str) -> None:
    """Give a file its final name, which must be free: a link refuses what a rename would replace."""
    try:
        os.link(source, out)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):  # a filesystem without hard links
            raise
        if os.path.lexists(out):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(source, out)


def exchange(first: str, second: str) -> bool:
    """Swap two paths atomically; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd = -100
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
