"""Download the weights of several repositories at once, in a process of its own that Ctrl-C ends within a second.

huggingface_hub's threads cannot be stopped in the middle of a file, and a process can. The process inherits the
library's settings, and downloads into its ordinary cache. This process shows one bar for the bytes of all files.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..cli import Bar, print_message
from ..errors import CheckpointError
from ..text import size_text
from .hub_ids import HubId

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_OWN = re.compile(r"\.[0-9a-f]{8}\.incomplete$")
INTERVAL = 0.2  # seconds between two looks at the files


class Download(NamedTuple):
    """The weights of a repository that the cache does not have.

    Attributes:
        hub_id: The repository and the revision.
        commit: The hash of the commit.
        folder: The snapshot of the commit in the cache.
        first: A file beside the weights, or the weights themselves if there is no other.
        sizes: The sizes of the files in bytes by name; None for a size that is not known.
    """

    hub_id: HubId
    commit: str
    folder: str
    first: str
    sizes: dict[str, int | None]

    @property
    def blobs(self) -> str:
        """The folder of the cache that has the bytes of the repository's files, and its partial files."""
        return os.path.join(os.path.dirname(os.path.dirname(self.folder)), "blobs")

    @property
    def complete(self) -> int:
        """The bytes of the files that are complete."""
        return sum(size or 0 for name, size in self.sizes.items() if os.path.exists(os.path.join(self.folder, name)))


def download(downloads: Sequence[Download], quiet: bool) -> None:
    """Download all files.

    Args:
        downloads: The files of each repository.
        quiet: Show no progress.

    Raises:
        CheckpointError: A file cannot be downloaded; the message names the repository.
    """
    began = time.monotonic()
    total = sum(size or 0 for each in downloads for size in each.sizes.values())
    bar: Callable[[int, int], None] | None = None if quiet else Bar()
    with _worker(downloads) as worker:
        try:
            error = _wait(worker, downloads, total, bar)
        except BaseException:
            lost = _end(worker, downloads)
            done = sum(each.complete for each in downloads)
            print_message(
                f"the download is interrupted: {size_text(done)} are complete, and {size_text(lost)} of files that are "
                "not will be downloaded again",
                quiet,
            )
            raise
        finally:
            if isinstance(bar, Bar):
                bar.close()
    if error is not None:
        raise CheckpointError(error)
    files, seconds = sum(len(each.sizes) for each in downloads), time.monotonic() - began
    rate = f"{size_text(total)} in {seconds:.1f} s, {size_text(total / max(seconds, 1e-3))}/s"
    print_message(f"downloaded {files} weight file{'s' * (files != 1)}, {rate}", quiet)


@contextlib.contextmanager
def _worker(downloads: Sequence[Download]) -> Iterator[subprocess.Popen[str]]:
    """Start the process that downloads; it ends when this process closes its input, or ends."""
    job = [[each.hub_id.repo, each.hub_id.revision, each.commit, list(each.sizes)] for each in downloads]
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "expo.inputs.download_worker"], env=environment, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as worker:  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        yield worker


def _wait(
    worker: subprocess.Popen[str], downloads: Sequence[Download], total: int, bar: Callable[[int, int], None] | None
) -> str | None:
    """Wait for the end of the process, and return the message of its error; None if all files are there."""
    while True:
        try:
            worker.wait(INTERVAL)
            break
        except subprocess.TimeoutExpired:
            if bar is not None:
                done = sum(each.complete for each in downloads) + sum(_partial_files(worker, downloads).values())
                bar(min(done, total), total)
    assert worker.stdout is not None
    said: Any = json.loads(worker.stdout.read() or "null")
    if isinstance(said, str):
        return said
    if worker.returncode:
        return f"{downloads[0].hub_id}: the process that downloads ended with the code {worker.returncode}; try again"
    return None


def _partial_files(worker: subprocess.Popen[str], downloads: Sequence[Download]) -> dict[str, int]:
    """Return the bytes of each partial file that the process has open, by its path."""
    blobs = {os.path.realpath(each.blobs) for each in downloads}
    found: dict[str, int] = {}
    for link in glob.glob(f"/proc/{worker.pid}/fd/*"):
        with contextlib.suppress(OSError):
            path = os.readlink(link)
            if path.endswith(".incomplete") and os.path.dirname(path) in blobs:
                found[path] = os.path.getsize(path)
    return found


def _end(worker: subprocess.Popen[str], downloads: Sequence[Download]) -> int:
    """End the process, remove its partial files that nothing can continue, and return how many bytes these had.

    Since version 2, huggingface_hub gives a partial file a name of its own, and does not continue another process's.
    """
    with contextlib.suppress(OSError):
        os.kill(worker.pid, signal.SIGSTOP)  # it closes and opens no file meanwhile
    partial = {path: size for path, size in _partial_files(worker, downloads).items() if _OWN.search(path)}
    worker.kill()
    worker.wait()
    for path in partial:
        with contextlib.suppress(OSError):
            os.remove(path)
    return sum(partial.values())
