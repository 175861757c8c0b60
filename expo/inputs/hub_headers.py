"""The headers of weights on the hub, downloaded without the weights: enough for the plan of a merge.

A stand-in is a temporary folder that takes the place of a snapshot with all weights. Each weight file in it has the
name, the size and the header of the real one, and no data.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shlex
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

from ..checkpoints.safetensors_header import MAX_HEADER
from ..errors import CheckpointError
from ..text import size_text
from .hub_errors import error_line, is_unreachable, list_names
from .hub_ids import HubId

FIRST_REQUEST = 1 << 16  # bytes of a weight file that the first request asks for: most headers are shorter
PARALLEL_REQUESTS = 8
ATTEMPTS = 3  # for each request
RETRY_DELAY = 1.0  # seconds


@contextlib.contextmanager
def stand_in_folder(hub_id: HubId) -> Iterator[str]:
    """Yield an empty temporary folder for a stand-in, and remove the folder at the end of the block.

    A CheckpointError of the block that names the folder is raised with the hub id in its place.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="expo-plan-")
    except OSError as error:
        raise CheckpointError(_no_folder(hub_id, error)) from error
    with temporary as folder:
        try:
            yield folder
        except CheckpointError as error:
            if folder not in str(error):
                raise
            raise CheckpointError(str(error).replace(folder, str(hub_id))) from error


def fill_stand_in(hub_id: HubId, commit: str, snapshot: str, weights: Mapping[str, int | None], folder: str) -> None:
    """Fill an empty folder with links to a snapshot's files and with stand-ins for the weights that it lacks.

    Args:
        hub_id: The repository.
        commit: The snapshot's commit.
        snapshot: The snapshot's folder.
        weights: The weight files that the snapshot lacks, with their sizes in bytes where these are known.
        folder: The empty folder.

    Raises:
        CheckpointError: A weight file has no header to download, or the folder cannot be written.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils.tqdm import tqdm

    pickled = {name: size for name, size in weights.items() if not name.endswith(".safetensors")}
    if pickled:
        raise CheckpointError(_no_header(hub_id, pickled))

    names = [name for name in weights if os.path.basename(name) == name]  # open_checkpoint refuses all other names
    bar: Callable[..., Iterable[tuple[str, bytes, int]]] = tqdm
    headers = _download_headers({name: hf_hub_url(hub_id.repo, name, revision=commit) for name in names})
    try:
        for entry in os.scandir(snapshot):
            if entry.is_file():
                os.symlink(os.path.abspath(entry.path), os.path.join(folder, entry.name))
    except OSError as error:
        raise CheckpointError(_no_folder(hub_id, error)) from error
    with contextlib.closing(headers):
        for name, start, size in bar(
            headers, desc=f"Fetching the headers of {hub_id.repo}", total=len(names), unit="file"
        ):
            try:
                with open(os.path.join(folder, name), "xb") as file:
                    file.write(start)
                    file.truncate(size)
            except OSError as error:
                raise CheckpointError(_no_folder(hub_id, error)) from error


def _download_headers(urls: Mapping[str, str]) -> Generator[tuple[str, bytes, int], None, None]:
    """Download the headers of safetensors files, PARALLEL_REQUESTS at a time.

    Args:
        urls: The files' addresses, by their names.

    Yields:
        In the order of arrival: a file's name, its bytes up to the end of its header, and its size in bytes.
    """
    waiting = deque(urls)
    results: SimpleQueue[tuple[str, bytes, int] | Exception] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                name = waiting.popleft()
                try:
                    results.put((name, *_download_header(name, urls[name])))
                except Exception as error:
                    results.put(error)

    for _ in range(min(PARALLEL_REQUESTS, len(urls))):
        threading.Thread(target=work, daemon=True).start()  # daemon: after Ctrl-C the process ends without these
    try:
        for _ in urls:
            result = results.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        waiting.clear()


def _download_header(name: str, url: str) -> tuple[bytes, int]:
    """Return a safetensors file's bytes up to the end of its header, and its size in bytes."""
    start, size = _first_bytes(name, url, FIRST_REQUEST)
    stop = 8 + int.from_bytes(start[:8], "little")
    # A header of an impossible length is not requested; open_checkpoint refuses it.
    if len(start) < stop <= min(size, 8 + MAX_HEADER):
        start, size = _first_bytes(name, url, stop)
    return start[:stop], size


def _first_bytes(name: str, url: str, count: int, attempts: int = ATTEMPTS) -> tuple[bytes, int]:
    """Return a file's first `count` bytes, or all of a shorter file, and the file's size in bytes."""
    try:
        return _request_first_bytes(name, url, count)
    except Exception as error:
        if attempts == 1 or not is_unreachable(error):
            raise
    time.sleep(RETRY_DELAY)
    return _first_bytes(name, url, count, attempts - 1)


def _request_first_bytes(name: str, url: str, count: int) -> tuple[bytes, int]:
    """Send one request for a file's first bytes; see `_first_bytes`."""
    from huggingface_hub import constants, utils

    library: Any = utils
    session = library.get_session()
    options = {
        "headers": {**library.build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"},
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
    }
    if callable(session.stream):  # a session of httpx; in one of requests, `stream` is an option and no method
        answer = session.stream("GET", url, follow_redirects=True, **options)
    else:
        answer = session.get(url, stream=True, **options)
    with answer as response:  # a stream, because a server or a proxy without ranges sends the whole file
        library.hf_raise_for_status(response)
        content_range = re.fullmatch(r"bytes 0-\d+/(\d+)", response.headers.get("Content-Range") or "")
        size = content_range[1] if content_range else response.headers.get("Content-Length")
        if size is None:
            raise CheckpointError(f"{url}: the server does not say how long the file is; run the merge without --plan")
        parts = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(FIRST_REQUEST)
        data = bytearray()
        for part in parts:
            data += part
            if len(data) >= count:
                break
    if len(data) < min(count, int(size)):
        raise ConnectionError(f"{name} broke off at byte {len(data)}")
    return bytes(data[:count]), int(size)


def _no_header(hub_id: HubId, weights: Mapping[str, int | None]) -> str:
    """Return the message about .bin weights, which a plan needs whole; it has the command that downloads them."""
    sizes = [size for size in weights.values() if size is not None]
    total = f", {size_text(sum(sizes))} in all" if len(sizes) == len(weights) else ""
    words = ["hf", "download", hub_id.repo]
    words += [] if hub_id.revision is None else ["--revision", hub_id.revision]
    pattern = re.sub(r"\d+", "*", next(iter(weights)))
    alike = len(weights) > 1 and all(fnmatch.fnmatchcase(name, pattern) for name in weights)
    words += ["--include", pattern] if alike else list(weights)
    return (
        f"{hub_id}: a plan of .bin weights needs the files themselves, and {list_names(list(weights))}{total}, "
        f"{'is' if len(weights) == 1 else 'are'} not in the cache; download with `{shlex.join(words)}`, or run the "
        "merge without --plan"
    )


def _no_folder(hub_id: HubId, error: OSError) -> str:
    """Return the message for a temporary folder that cannot be created or written."""
    return (
        f"{hub_id}: no temporary folder for the headers ({error_line(error)}); set TMPDIR to a folder that can be "
        "written to"
    )
