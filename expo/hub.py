"""Checkpoints by their ids on the Hugging Face hub: the files that a merge needs, in the library's ordinary cache.

Addresses, tokens, the cache's place, offline mode, retries and progress bars are huggingface_hub's, which is imported
when something is fetched and not before. It may use requests, httpx or httpx2: their errors are told by their bases.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .checkpoint import INDEX, INDEX_BIN, SINGLE, SINGLE_BIN, load_json
from .errors import CheckpointError
from .plan import OTHER_WEIGHTS, sort_files

ADAPTER_CONFIG = "adapter_config.json"
FORMS = (  # of weights, the one that transformers would choose first: the file, and those that it needs beside it
    (SINGLE, ()),
    (INDEX, ()),
    (SINGLE_BIN, ()),
    (INDEX_BIN, ()),
    ("adapter_model.safetensors", (ADAPTER_CONFIG,)),
    ("adapter_model.bin", (ADAPTER_CONFIG,)),
)
INDEXES = (INDEX, INDEX_BIN)
ABOUT_WEIGHTS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "quantize_config.json", "hf_quant_config.json", ADAPTER_CONFIG,
)  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SHOWN = 5  # files that a message names one by one
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


def fetch(hub_id: HubId, weights_only: bool = False, quiet: bool = False) -> Snapshot:
    """Have a repository's files in the cache: those that are not there yet are downloaded.

    The weights in the one form that transformers would choose, and with them what a merge carries along from aligned;
    weights_only: what sft needs, the weights and what says how to read them. quiet: no progress bars. Where the hub
    cannot be reached, what the cache has of that revision counts, if it is complete.
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
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=timeout)
        except Exception as error:
            if not _unreachable(error):
                raise
            return _cached(hub_id, weights_only, error)
        names = [file.rfilename for file in info.siblings or ()]
        if info.sha is None:
            raise CheckpointError(f"{hub_id}: {constants.ENDPOINT} does not say which commit that is; is it a hub?")
        return _download(hub_id, info.sha, names, weights_only)


def choose(hub_id: HubId, names: Sequence[str], weights_only: bool = False) -> Files:
    """Those of a repository's files that are needed. Raises CheckpointError where no weights of it can be read."""
    there = set(names)
    form = next((file for file, beside in FORMS if there.issuperset((file, *beside))), None)
    if form is None:
        raise CheckpointError(_nothing_to_read(hub_id, names))
    others = [name for name in (*ABOUT_WEIGHTS, form) if name in there and (name in INDEXES or name != form)]
    if not weights_only:
        readme = [name for name in names if name == "README.md"]
        others = list(dict.fromkeys((*others, *readme, *sort_files(sorted(names))[0])))
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


def _download(hub_id: HubId, commit: str, names: Sequence[str], weights_only: bool) -> Snapshot:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    repo = hub_id.repo
    files = choose(hub_id, names, weights_only)
    first = files.others or files.weights
    folder = snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in first])
    weights = _shards(hub_id, folder, files.index_file, names) if files.index_file else files.weights
    # One by one and in this thread, where Ctrl-C ends a download at once: snapshot_download would first let every
    # file that it is at come to its end.
    bar: Callable[..., Iterable[str]] = tqdm
    for name in bar(weights, desc=f"Fetching the weights of {repo}", unit="file"):
        hf_hub_download(repo, name, revision=commit)
    with contextlib.suppress(Exception):  # the cache learns which commit the name stands for, now that all is there
        hf_hub_download(repo, first[0], revision=hub_id.revision)
    return Snapshot(folder, repo, commit)


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


def _cached(hub_id: HubId, weights_only: bool, error: Exception) -> Snapshot:
    """What the cache has of that revision; `error` is why the hub was not asked."""
    from huggingface_hub import constants, errors, snapshot_download

    folder = None
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True, allow_patterns=[])
    lacking = _lacking(hub_id, folder, weights_only) if folder else []
    if folder and not lacking:
        return Snapshot(folder, hub_id.repo, os.path.basename(folder))
    fact = f"lacks {_listing(lacking)}" if folder else "has nothing of it"
    why, fix = _silence(error)
    raise CheckpointError(f"{hub_id}: {why}, and the cache {constants.HF_HUB_CACHE} {fact}; {fix}")


def _lacking(hub_id: HubId, folder: str, weights_only: bool) -> list[str]:
    """Files that are needed and not in the snapshot."""
    try:
        files = choose(hub_id, _known(hub_id, folder), weights_only)
    except CheckpointError:
        return ["weights that can be read"]
    lacking = [name for name in (*files.others, *files.weights) if not os.path.exists(os.path.join(folder, name))]
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
