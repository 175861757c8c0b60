"""The staging folder: a hidden folder beside an output, in which a merge makes the output and commits it whole.

A merge changes nothing at the output's path before `Staging.commit`. It writes and syncs the shards and the other files
in the staging folder, the index last, and one rename puts the folder (or the one file) in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Container, Iterable

from ..errors import OutputError
from .atomic import exchange, place_under_free_name, sync_folder, write_durably
from .mounts import refuse_mount_point
from .os_errors import output_errors

JOURNAL = ".expo-journal"  # the journal's file in the staging folder; journal.py explains it
# The digest of an output of one file is OUT.sha256 beside the output, and .sha256 in the staging folder.
DIGEST_SUFFIX = ".sha256"


def staging_folder(out: str) -> str:
    """Return the path of an output's staging folder: hidden, beside the output, `.NAME.expo-staging`."""
    parent, name = os.path.split(os.path.realpath(out))
    return os.path.join(parent, f".{name}.expo-staging")


def staged_bytes(out: str) -> int:
    """Return the bytes of disk that the staging folder of an interrupted merge takes; 0 if there is none."""
    total = 0
    for folder, _, names in os.walk(staging_folder(out)):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def check_free(out: str, single_file: bool, overwrite: bool) -> None:
    """Check that an output may be put at its path.

    Args:
        out: The output's path.
        single_file: True where the output is one file.
        overwrite: True where the user allows to replace an output.

    Raises:
        OutputError: The path exists and must not be replaced, or it cannot be replaced.
    """
    refuse_mount_point(out, single_file)
    if not os.path.exists(out):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; choose another `out`, or `overwrite=True` replaces it")
    if os.path.isdir(out) == single_file:
        kinds = ("file", "folder") if single_file else ("folder", "file")
        raise OutputError(f"{out}: a {kinds[0]} is to be written, but a {kinds[1]} is there; choose another `out`")
    with output_errors(out):
        names = os.listdir(out) if not single_file else []
    if names and not any(name.endswith(".safetensors") for name in names):
        raise OutputError(f"{out} is a folder without a model, which `overwrite=True` does not replace")


def lock(fd: int) -> bool:
    """Lock an open file or folder for this process alone.

    Returns:
        False if another process has the lock. True otherwise, also on a filesystem without locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_locked(path: str) -> bool:
    """Return True if another process has locked a file."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # over NFS a lock needs a file open for writing
    except OSError:
        return False
    try:
        return not lock(fd)
    finally:
        os.close(fd)


def journals_of_ranks(folder: str) -> list[str]:
    """Return the names of all journals in a staging folder except rank 0's, in alphabetical order."""
    return sorted(name for name in os.listdir(folder) if name.startswith(f"{JOURNAL}."))


class Staging:
    """A locked staging folder. It is a context manager that removes the folder on exit, unless it was committed.

    Attributes:
        out: The output's path, with links resolved.
        parent: The folder that will contain the output.
        folder: The staging folder's path.
        single_file: True where the output is the one file in the staging folder, not the folder itself.
        committed: True once the output is in place.
    """

    def __init__(self, out: str, single_file: bool, overwrite: bool, resume: bool = False) -> None:
        """Create and lock the staging folder.

        Args:
            out: The output's path.
            single_file: True where the output is one file.
            overwrite: Replace an existing output, and empty a staging folder that an interrupted merge has left.
            resume: Keep the staging folder of an interrupted merge as it is.

        Raises:
            OutputError: The output exists (without overwrite), the staging folder exists (without overwrite and
                resume), another process has locked it, or the system refuses.
        """
        self.out = os.path.realpath(out)
        self.single_file = single_file
        self.overwrite = overwrite
        self.resume = resume
        self.parent = os.path.dirname(self.out)
        self.folder = staging_folder(out)
        self.committed = False
        self._lock = -1
        self._remove_on_exit = False
        self._created_parents: list[str] = []  # from the innermost to the outermost
        check_free(self.out, single_file, overwrite)
        try:
            with output_errors(self.folder):
                self._create_parents()
                self._create()
        except BaseException:
            self._clean_up()
            raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def _create_parents(self) -> None:
        """Create the folders above the output that do not exist."""
        parent = self.parent
        while not os.path.exists(parent):
            self._created_parents.append(parent)
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            raise OutputError(f"{self.out}: {parent} is not a folder; choose another `out`")
        os.makedirs(self.parent, exist_ok=True)

    def _create(self) -> None:
        """Create the staging folder, or take over the one of an interrupted merge, and lock it."""
        try:
            os.mkdir(self.folder)
            self._remove_on_exit = True
        except FileExistsError:
            pass
        existed = not self._remove_on_exit
        if not self._take_lock():
            self._remove_on_exit = False
            raise OutputError(f"{self.out}: another merge is writing it now, in {self.folder}")
        if existed and any(_is_locked(self.path(name)) for name in journals_of_ranks(self.folder)):
            raise OutputError(f"{self.out}: ranks of an interrupted merge are still stopping: try again in a moment")
        if existed and not (self.overwrite or self.resume):
            raise OutputError(
                f"{self.folder} was left by an interrupted merge: `resume=True` continues it, `overwrite=True` starts "
                "anew"
            )
        self._remove_on_exit = not (existed and self.resume)
        if not self.resume:
            self.clear()

    def _take_lock(self) -> bool:
        """Lock the staging folder until this process closes it or ends; return False if another process has it."""
        # O_NOFOLLOW: where the name is a link, its target is a folder that this merge must not empty.
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        return lock(self._lock)

    def clear(self, keep: Container[str] = ()) -> None:
        """Remove everything in the staging folder except the files with the names in `keep`. Raises OSError."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name not in keep:
                    os.unlink(entry.path)

    def keep(self) -> None:
        """Keep the staging folder on exit, for a merge that resumes."""
        self._remove_on_exit = False

    def discard(self) -> None:
        """Remove the staging folder on exit, also after a call of `keep`; a committed output stays."""
        self._remove_on_exit = not self.committed

    def _clean_up(self) -> None:
        """Remove the staging folder unless it is to be kept, and created parents that are empty; unlock the folder."""
        if self._remove_on_exit:
            shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._created_parents:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def path(self, name: str) -> str:
        """Return the path of a file in the staging folder."""
        return os.path.join(self.folder, name)

    def put(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a file durably; a name such as "sub/code.py" puts it into a subfolder. Raises OutputError."""
        path = self.path(name)
        with output_errors(path):
            write_durably(path, parts)

    def put_digest(self, parts: Iterable[bytes]) -> None:
        """Write the digest of an output of one file, which commit puts beside the output as `OUT.sha256`.

        Raises OutputError, also if `OUT.sha256` exists and must not be overwritten.
        """
        path = self.out + DIGEST_SUFFIX
        if os.path.lexists(path) and not self.overwrite:
            raise OutputError(f"{path} exists; choose another `out`, or `overwrite=True` replaces it")
        self.put(DIGEST_SUFFIX, parts)

    def commit(self) -> list[str]:
        """Put the finished output in place: sync the staging folder, rename it, and sync the parent.

        Returns:
            Warnings: an old folder was not replaced in one atomic step or could not be removed, the digest is not
            beside the file, or the parent was not synced.

        Raises:
            OutputError: The output is not in place.
        """
        warnings: list[str] = []
        with output_errors(self.out):
            for folder, _, _ in os.walk(self.folder):
                sync_folder(folder)
            if self.single_file:
                self._place_file()
            elif self.overwrite and os.path.isdir(self.out):
                warnings = self._replace_folder()
            else:
                os.rename(self.folder, self.out)  # fails if a file, or a folder that is not empty, has appeared there
                self._remove_on_exit = False
            self.committed = True
        if self.single_file:
            self._remove_on_exit = True  # the rest is not needed, also if an earlier merge began the folder
            warnings += self._place_digest()
        try:
            for folder in (self.parent, *map(os.path.dirname, self._created_parents)):
                sync_folder(folder)
        except OSError as error:
            warnings.append(f"{self.out} is complete, but may be gone after a power failure: {error.strerror}")
        return warnings

    def _place_file(self) -> None:
        """Put the one file that is the output in place."""
        (name,) = {*os.listdir(self.folder)} - {JOURNAL, DIGEST_SUFFIX}
        if self.overwrite:
            os.rename(self.path(name), self.out)
        else:
            place_under_free_name(self.path(name), self.out)

    def _place_digest(self) -> list[str]:
        """Put the digest, if there is one, beside the output's file; return a warning where that fails."""
        path = self.out + DIGEST_SUFFIX
        try:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path(DIGEST_SUFFIX), path)
        except OSError as error:
            return [f"{self.out} is complete, but {path} could not be written: {error.strerror}"]
        return []

    def _replace_folder(self) -> list[str]:
        """Swap the staging folder and the old output, in one step if the system can, and remove the old output."""
        warnings = []
        old = self.folder
        old_lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The swap gives the old output the staging folder's name; the lock keeps other merges from taking it over.
            lock(old_lock)
            if exchange(self.folder, self.out):
                self._remove_on_exit = True  # from now on self.folder is the old output
            else:
                old = f"{self.folder}-old"
                self._swap_in_two_steps(old)
                self._remove_on_exit = False
                warnings.append(f"{self.out} was replaced in two steps: this filesystem cannot swap folders")
            self.committed = True
            try:
                shutil.rmtree(old)
            except OSError as error:
                warnings.append(f"{old}, the model that was replaced, could not be removed: {error.strerror}")
            self._remove_on_exit = False  # reset after the removal, so that `_clean_up` completes an interrupted one
        finally:
            os.close(old_lock)
        return warnings

    def _swap_in_two_steps(self, old: str) -> None:
        """Rename the old output to `old` and the staging folder to the output; undo the first if the second fails."""
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except OSError:
            os.rename(old, self.out)
            raise
