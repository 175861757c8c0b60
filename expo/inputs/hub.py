"""Checkpoints by their ids on the Hugging Face hub: the files that a merge needs, in the library's ordinary cache.

Addresses, tokens, the cache's place, offline mode, retries and progress bars are huggingface_hub's, which is imported
when something is fetched and not before. It may use requests, httpx or httpx2: their errors are told by their bases.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import os
import re
import shlex
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from ..checkpoints.custom_code import find_code
from ..checkpoints.files import (
    ADAPTER,
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    INDEX_BIN,
    SINGLE,
    SINGLE_BIN,
    load_json,
)
from ..checkpoints.safetensors_header import MAX_HEADER
from ..checkpoints.sidecars import CARD, OTHER_WEIGHTS, Code, sort_files
from ..errors import CheckpointError
from ..text import size_text

FORMS = (  # of weights, the one that transformers would choose first: the file, and those that it needs beside it
    (SINGLE, ()),
    (INDEX, ()),
    (SINGLE_BIN, ()),
    (INDEX_BIN, ()),
    (ADAPTER, (ADAPTER_CONFIG,)),
    (ADAPTER_BIN, (ADAPTER_CONFIG,)),
)
INDEXES = (INDEX, INDEX_BIN)
ABOUT_WEIGHTS = (
    CONFIG, "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "quantize_config.json", "hf_quant_config.json", ADAPTER_CONFIG,
)  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SHOWN = 5  # files that a message names one by one
FIRST = 1 << 16  # bytes of a weight file that are asked for first: most headers are shorter
TOGETHER = 8  # headers asked for at a time
TRIES = 3  # of each of them
AGAIN = "run the same command again: what is complete is not downloaded again"

_PART = r"(?=[\w.-]{1,96}(?:[/@]|$))\w(?:[\w.-]*\w)?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([^\s~^:?*\[\\\x00-\x1f\x7f]+))?", re.ASCII)
_FILE = (".git", ".safetensors", ".bin", ".pt", ".pth")  # what no repository's name ends in, but a path may
_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})(?=/|$)", re.ASCII)


class HubId(NamedTuple):
    """A repository of the hub, and a branch, tag or commit of it; None is the hub's default, main."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision or 'main'}"


class Snapshot(NamedTuple):
    """A folder of the cache with one commit's files, as far as they were fetched."""

    folder: str
    repo: str
    commit: str


class Files(NamedTuple):
    """What is needed of a repository. weights: none where `index_file`, which is one of `others`, names them."""

    weights: list[str]
    index_file: str | None
    others: list[str]


def parse(text: str) -> HubId | None:
    """`org/name` or `org/name@revision`; None where it cannot be one. A path that exists should go first."""
    match = _ID.fullmatch(text)
    if match is None:
        return None
    repo, revision = match.groups()
    if "--" in repo or ".." in text or repo.endswith(_FILE):
        return None
    if revision is not None and (revision.startswith(("/", "-")) or revision.endswith("/") or "//" in revision):
        return None
    return HubId(repo, revision)


def origin(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """(repository, commit) of a snapshot folder of a hub cache, or of something in it; None of any other path."""
    for place in (os.path.abspath(path), os.path.realpath(path)):  # a file's real path is a blob's, without its name
        match = _SNAPSHOT.search(place)
        if match:
            return match[1].replace("--", "/", 1), match[2]
    return None


def fetch(
    hub_id: HubId,
    weights_only: bool = False,
    quiet: bool = False,
    headers_in: str | None = None,
    carry: Sequence[str] = (),
) -> Snapshot:
    """Have a repository's files in the cache: those that are not there yet are downloaded.

    The weights in the one form that transformers would choose, and with them what a merge carries along from aligned;
    weights_only: what sft needs, the weights and what says how to read them. carry: patterns of further files to carry
    along. quiet: no progress bars. Where the hub
    cannot be reached, what the cache has of that revision counts, if it is complete.
    headers_in: an empty folder. Weights that the cache does not have are not downloaded then: the folder gets files of
    their names and sizes that hold their headers and no data, and links to the rest; it stays empty where none lack.
    Raises CheckpointError naming the repository and the revision.
    """
    try:
        from huggingface_hub import HfApi, constants
    except Exception as error:  # it is not there, or a variable that it reads makes no sense to it
        raise CheckpointError(
            f"{hub_id}: hub ids need huggingface_hub 0.34 or later, which cannot be imported ({_line(error)}); "
            "pip install -U huggingface_hub, or download it by other means and give the folder"
        ) from error
    with _explained(hub_id), _bars(quiet):
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            sizes_too = headers_in is not None
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=timeout, files_metadata=sizes_too)
        except Exception as error:
            if not _unreachable(error):
                raise
            return _cached(hub_id, weights_only, carry, error)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        if info.sha is None:
            raise CheckpointError(f"{hub_id}: {constants.ENDPOINT} does not say which commit that is; is it a hub?")
        return _download(hub_id, info.sha, sizes, weights_only, headers_in, carry)


@contextlib.contextmanager
def stand_in(hub_id: HubId) -> Iterator[str]:
    """An empty folder for `headers_in`, which is there until the end of the block; errors name the id in its place."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="expo-plan-")
    except OSError as error:
        raise CheckpointError(_no_room(hub_id, error)) from error
    with temporary as folder:
        try:
            yield folder
        except CheckpointError as error:
            if folder not in str(error):
                raise
            raise CheckpointError(str(error).replace(folder, str(hub_id))) from error


def choose(hub_id: HubId, names: Sequence[str], weights_only: bool = False, carry: Sequence[str] = ()) -> Files:
    """Those of a repository's files that are needed, without custom code, which `_code` finds.

    Raises CheckpointError where no weights of it can be read.
    """
    there = set(names)
    form = next((file for file, beside in FORMS if there.issuperset((file, *beside))), None)
    if form is None:
        raise CheckpointError(_nothing_to_read(hub_id, names))
    others = [name for name in (*ABOUT_WEIGHTS, form) if name in there and (name in INDEXES or name != form)]
    if not weights_only:
        readme = [CARD] if CARD in there else []
        others = list(dict.fromkeys((*others, *readme, *sort_files(sorted(names), carry=carry).carried)))
    return Files([], form, others) if form in INDEXES else Files([form], None, others)


def _nothing_to_read(hub_id: HubId, names: Sequence[str]) -> str:
    found = [name for name in names if name.endswith(OTHER_WEIGHTS)] or list(names)
    kinds = " (GGUF)" if any(name.endswith(".gguf") for name in found) else ""
    return (
        f"{hub_id}: no weights that can be read, which are {', '.join(form for form, _ in FORMS)}, but "
        f"{_listing(found) or 'no files at all'}{kinds}; give the repository that it was made from"
    )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _download(
    hub_id: HubId,
    commit: str,
    sizes: Mapping[str, int | None],
    weights_only: bool,
    headers_in: str | None,
    carry: Sequence[str],
) -> Snapshot:
    """sizes: of the repository's files, where they are known."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    repo, names = hub_id.repo, list(sizes)
    files = choose(hub_id, names, weights_only, carry)
    first = files.others or files.weights
    wanted, asked = first, set[str]()
    while wanted:  # code says what other code it needs, once it is there
        asked.update(wanted)
        folder = snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in wanted])
        wanted = [] if weights_only else [name for name in _code(folder, names) if name not in asked]
    weights = _shards(hub_id, folder, files.index_file, names) if files.index_file else files.weights
    lacking = [name for name in weights if not os.path.exists(os.path.join(folder, name))]
    if headers_in is not None and lacking:
        _stand_in(hub_id, commit, folder, {name: sizes[name] for name in lacking}, headers_in)
        return Snapshot(folder, repo, commit)
    # One by one and in this thread, where Ctrl-C ends a download at once: snapshot_download would first let every
    # file that it is at come to its end.
    bar: Callable[..., Iterable[str]] = tqdm
    for name in bar(weights, desc=f"Fetching the weights of {repo}", unit="file"):
        hf_hub_download(repo, name, revision=commit)
    with contextlib.suppress(Exception):  # the cache learns which commit the name stands for, now that all is there
        hf_hub_download(repo, first[0], revision=hub_id.revision)
    return Snapshot(folder, repo, commit)


def _code(folder: str, names: Iterable[str]) -> list[str]:
    """Return the custom code among a repository's files that the snapshot names and does not have yet."""
    found = find_code({name: os.path.join(folder, name) for name in names}).files
    needed = sort_files(sorted(found), Code(found)).carried
    return [name for name in needed if not os.path.exists(os.path.join(folder, name))]


def _shards(hub_id: HubId, folder: str, index: str, names: Sequence[str]) -> list[str]:
    weight_map = load_json(os.path.join(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{hub_id}: {index} has no weight_map object that gives each tensor its file")
    shards = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in shards if name not in names]
    if missing:
        raise CheckpointError(
            f"{hub_id}: {index} names {_listing(missing)}, which the repository does not have; give a revision that is "
            "complete"
        )
    return shards


def _stand_in(hub_id: HubId, commit: str, snapshot: str, weights: Mapping[str, int | None], place: str) -> None:
    """Fill `place` with what can be opened like the snapshot if these weights, of these sizes, were in it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils.tqdm import tqdm

    pickled = {name: size for name, size in weights.items() if not name.endswith(".safetensors")}
    if pickled:
        raise CheckpointError(_no_header(hub_id, pickled))

    inside = [name for name in weights if os.path.basename(name) == name]  # for others, opening says what is wrong
    bar: Callable[..., Iterable[tuple[str, bytes, int]]] = tqdm
    headers = _headers({name: hf_hub_url(hub_id.repo, name, revision=commit) for name in inside})
    try:
        for entry in os.scandir(snapshot):
            if entry.is_file():
                os.symlink(os.path.abspath(entry.path), os.path.join(place, entry.name))
    except OSError as error:
        raise CheckpointError(_no_room(hub_id, error)) from error
    with contextlib.closing(headers):
        for name, head, size in bar(
            headers, desc=f"Fetching the headers of {hub_id.repo}", total=len(inside), unit="file"
        ):
            try:
                with open(os.path.join(place, name), "xb") as file:
                    file.write(head)
                    file.truncate(size)
            except OSError as error:
                raise CheckpointError(_no_room(hub_id, error)) from error


def _headers(urls: Mapping[str, str]) -> Generator[tuple[str, bytes, int], None, None]:
    """Of each safetensors file its name, its bytes up to the end of the header, and its size, as they come."""
    waiting = deque(urls)
    found: SimpleQueue[tuple[str, bytes, int] | Exception] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                name = waiting.popleft()
                try:
                    found.put((name, *_header(name, urls[name])))
                except Exception as error:
                    found.put(error)

    for _ in range(min(TOGETHER, len(urls))):
        threading.Thread(target=work, daemon=True).start()  # which Ctrl-C does not wait for
    try:
        for _ in urls:
            one = found.get()
            if isinstance(one, Exception):
                raise one
            yield one
    finally:
        waiting.clear()


def _header(name: str, url: str) -> tuple[bytes, int]:
    head, size = _head(name, url, FIRST)
    stop = 8 + int.from_bytes(head[:8], "little")
    if len(head) < stop <= min(size, 8 + MAX_HEADER):  # else opening says what is wrong
        head, size = _head(name, url, stop)
    return head[:stop], size


def _no_header(hub_id: HubId, weights: Mapping[str, int | None]) -> str:
    sizes = [size for size in weights.values() if size is not None]
    much = f", {size_text(sum(sizes))} in all" if len(sizes) == len(weights) else ""
    words = ["hf", "download", hub_id.repo]
    words += [] if hub_id.revision is None else ["--revision", hub_id.revision]
    pattern = re.sub(r"\d+", "*", next(iter(weights)))
    alike = len(weights) > 1 and all(fnmatch.fnmatchcase(name, pattern) for name in weights)
    words += ["--include", pattern] if alike else list(weights)
    return (
        f"{hub_id}: a plan of .bin weights needs the files themselves, and {_listing(list(weights))}{much}, "
        f"{'is' if len(weights) == 1 else 'are'} not in the cache; download with `{shlex.join(words)}`, or run the "
        "merge without --plan"
    )


def _no_room(hub_id: HubId, error: OSError) -> str:
    return (
        f"{hub_id}: no temporary folder for the headers ({_line(error)}); set TMPDIR to a folder that can be written to"
    )


def _head(name: str, url: str, count: int, tries: int = TRIES) -> tuple[bytes, int]:
    """A file's first bytes, `count` unless it has fewer, and its size."""
    try:
        return _head_once(name, url, count)
    except Exception as error:
        if tries == 1 or not _unreachable(error):
            raise
    time.sleep(1)
    return _head(name, url, count, tries - 1)


def _head_once(name: str, url: str, count: int) -> tuple[bytes, int]:
    from huggingface_hub import constants, utils

    library: Any = utils
    session = library.get_session()
    options = {
        "headers": {**library.build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"},
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
    }
    if callable(session.stream):  # httpx's; of requests' it is an option
        answer = session.stream("GET", url, follow_redirects=True, **options)
    else:
        answer = session.get(url, stream=True, **options)
    with answer as response:  # read as it comes: where a proxy does not know of ranges, it would be the whole file
        library.hf_raise_for_status(response)
        ranged = re.fullmatch(r"bytes 0-\d+/(\d+)", response.headers.get("Content-Range") or "")
        size = ranged[1] if ranged else response.headers.get("Content-Length")
        if size is None:
            raise CheckpointError(f"{url}: the server does not say how long the file is; run the merge without --plan")
        pieces = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(FIRST)
        data = bytearray()
        for piece in pieces:
            data += piece
            if len(data) >= count:
                break
    if len(data) < min(count, int(size)):
        raise ConnectionError(f"{name} broke off at byte {len(data)}")
    return bytes(data[:count]), int(size)


def _cached(hub_id: HubId, weights_only: bool, carry: Sequence[str], error: Exception) -> Snapshot:
    """What the cache has of that revision; `error` is why the hub was not asked."""
    from huggingface_hub import constants, errors, snapshot_download

    folder = None
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True, allow_patterns=[])
    lacking = _lacking(hub_id, folder, weights_only, carry) if folder else []
    if folder and not lacking:
        return Snapshot(folder, hub_id.repo, os.path.basename(folder))
    fact = f"lacks {_listing(lacking)}" if folder else "has nothing of it"
    why, fix = _silence(error)
    raise CheckpointError(f"{hub_id}: {why}, and the cache {constants.HF_HUB_CACHE} {fact}; {fix}")


def _lacking(hub_id: HubId, folder: str, weights_only: bool, carry: Sequence[str]) -> list[str]:
    """Files that are needed and not in the snapshot."""
    known = _known(hub_id, folder)
    try:
        files = choose(hub_id, known, weights_only, carry)
    except CheckpointError:
        return ["weights that can be read"]
    code = [] if weights_only else _code(folder, known)
    needed = dict.fromkeys((*files.others, *code, *files.weights))
    lacking = [name for name in needed if not os.path.exists(os.path.join(folder, name))]
    if files.index_file and files.index_file not in lacking:
        index = load_json(os.path.join(folder, files.index_file)).get("weight_map")
        shards = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
        lacking += [name for name in shards if not os.path.exists(os.path.join(folder, name))]
    return lacking


def _known(hub_id: HubId, folder: str) -> list[str]:
    """The commit's files, as newer versions of the library have noted them down; else those in the snapshot."""
    try:
        from huggingface_hub import get_cached_repo_tree

        return [file.path for file in get_cached_repo_tree(hub_id.repo, revision=os.path.basename(folder))]
    except Exception:
        return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or are_progress_bars_disabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield  # the variable has the last word
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _explained(hub_id: HubId) -> Iterator[None]:
    """Whatever the library raises, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{hub_id}: {_why(hub_id, _cause(error))}") from error


def _why(hub_id: HubId, error: BaseException) -> str:
    """What the hub said, or the system, and the fix."""
    from huggingface_hub import constants, errors

    page, status = f"{constants.ENDPOINT}/{hub_id.repo}", _status(error)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated, and {_token()}; accept its conditions at {page} and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository on {constants.ENDPOINT}, or a private one, and {_token()}; check the name, or {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository is there, but no such branch, tag or commit; see {page}/tree/main"
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token ({_line(error)}); {login}"
    if status == 403:
        return f"{constants.ENDPOINT} forbids it, and {_token()} ({_line(error)}); use one with read access"
    if _local(error):
        assert isinstance(error, OSError)
        place = os.fspath(error.filename) if error.filename else constants.HF_HUB_CACHE
        fix = "make room there, or set" if error.errno in FULL else "set"
        return f"{place!s}: {error.strerror}; {fix} HF_HOME to another folder, then {AGAIN}"
    if _unreachable(error):
        return "; ".join(_silence(error))
    return f"it cannot be downloaded ({_line(error)})"


def _silence(error: BaseException) -> tuple[str, str]:
    """Why the hub does not answer, and the fix."""
    from huggingface_hub import constants, errors

    error = _cause(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the library is offline (HF_HUB_OFFLINE is set)", "unset HF_HUB_OFFLINE to have it downloaded"
    if _status(error) == 429:
        return f"{constants.ENDPOINT} is asked too often ({_line(error)})", f"wait a few minutes, then {AGAIN}"
    return f"no connection to {constants.ENDPOINT}, or a broken one ({_line(error)})", AGAIN


def _token() -> str:
    from huggingface_hub import get_token

    return "the token that is set does not open it" if get_token() else "no token is set"


def _cause(error: BaseException) -> BaseException:
    """The library hides the reason for which it looked into the cache behind what it did not find there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _unreachable(error: BaseException) -> bool:
    """Whether the hub could not be asked or did not answer; then the cache may do, or another try."""
    error = _cause(error)
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    lost: tuple[type[BaseException], ...] = (OSError, *_http_errors())
    return isinstance(error, lost) and not _local(error)


def _local(error: BaseException) -> bool:
    """Whether the system said no to a file."""
    elsewhere: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError, *_http_errors())
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, elsewhere)


def _http_errors() -> tuple[type[BaseException], ...]:
    """The HTTP library's own base classes, whichever it is: those that are not Python's or the hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    ours = ("builtins", "huggingface_hub")
    mro: tuple[type[BaseException], ...] = HfHubHTTPError.__mro__[:-1]
    return tuple(base for base in mro if base.__module__.partition(".")[0] not in ours)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()}" if text else type(error).__name__
