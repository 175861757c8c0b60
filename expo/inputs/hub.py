"""Checkpoints on the Hugging Face hub: the files that a merge needs are downloaded into the library's ordinary cache.

huggingface_hub decides on addresses, tokens, the place of the cache, offline mode, retries and progress bars. It is
imported when something is fetched, and not before.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
from ..checkpoints.sidecars import CARD, OTHER_WEIGHTS, Code, sort_files
from ..errors import CheckpointError
from .downloads import Download, download
from .hub_errors import error_line, explain_hub_errors, explain_unreachable, is_unreachable, list_names
from .hub_headers import fill_stand_in
from .hub_ids import HubId, Snapshot

WEIGHT_FORMS = (  # in the order in which transformers chooses: a file, and the files that it needs beside it
    (SINGLE, ()),
    (INDEX, ()),
    (SINGLE_BIN, ()),
    (INDEX_BIN, ()),
    (ADAPTER, (ADAPTER_CONFIG,)),
    (ADAPTER_BIN, (ADAPTER_CONFIG,)),
)
INDEXES = (INDEX, INDEX_BIN)
ABOUT_WEIGHTS = (  # files that say how the weights and their vocabulary are to be read
    CONFIG, "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "quantize_config.json", "hf_quant_config.json", ADAPTER_CONFIG,
)  # fmt: skip
TOKENS = ("tokenizer.model", "vocab.json", "merges.txt")  # the tokens, where there is no tokenizer.json


class RepositoryFiles(NamedTuple):
    """The files of a repository that a merge needs.

    Attributes:
        weights: The weight files; empty if an index names them.
        index_file: The index's name, which is also among `others`; None for weights in one file.
        others: All other files.
    """

    weights: list[str]
    index_file: str | None
    others: list[str]


def fetch(
    hub_id: HubId,
    weights_only: bool = False,
    quiet: bool = False,
    headers_folder: str | None = None,
    carry: Sequence[str] = (),
    later: list[Download] | None = None,
) -> Snapshot:
    """Download the files of a repository that a merge needs and the cache does not have.

    The weights are fetched in the one form that transformers would choose. If the hub cannot be reached, the files in
    the cache are used, provided that the cache has all files of the revision.

    Args:
        hub_id: The repository and the revision.
        weights_only: Fetch what a merge needs of sft: the weights, and the files that say how to read them. Otherwise
            fetch what it needs of aligned: also the files that the output takes over.
        quiet: Show no progress bars.
        headers_folder: An empty folder. Weights that the cache does not have are then not downloaded: the folder
            receives a stand-in for the snapshot (see hub_headers.py), or stays empty if the cache has all weights.
        carry: Patterns of further files that the output takes over from aligned.
        later: A list that receives the download of the weights, for `complete`; None to download them in this call.

    Returns:
        The folder of the cache with the revision's files.

    Raises:
        CheckpointError: The files are not there or cannot be downloaded; the message names repository and revision.
    """
    _check_library(hub_id)
    from huggingface_hub import HfApi, constants

    with explain_hub_errors(hub_id), _progress_bars(quiet):
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=timeout, files_metadata=True)
        except Exception as error:
            if not is_unreachable(error):
                raise
            return _find_in_cache(hub_id, weights_only, carry, error)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        if info.sha is None:
            raise CheckpointError(f"{hub_id}: {constants.ENDPOINT} does not name the revision's commit; is it a hub?")
        now: list[Download] = []
        pending = now if later is None else later
        snapshot = _download(hub_id, info.sha, sizes, weights_only, headers_folder, carry, pending)
    complete(now, quiet)
    return snapshot


def _check_library(hub_id: HubId) -> None:
    """Raise CheckpointError if huggingface_hub cannot be imported."""
    try:
        from huggingface_hub import HfApi, constants  # noqa: F401
    except Exception as error:  # the library is not installed, or one of its environment variables has a bad value
        raise CheckpointError(
            f"{hub_id}: hub ids need huggingface_hub 0.34 or later, which cannot be imported ({error_line(error)}); "
            "pip install -U huggingface_hub, or download it by other means and give the folder"
        ) from error


def complete(downloads: Sequence[Download], quiet: bool) -> None:
    """Download the weights of all repositories at the same time.

    Args:
        downloads: What `fetch` has left for later.
        quiet: Show no progress.

    Raises:
        CheckpointError: A file cannot be downloaded; the message names the repository.
    """
    if not downloads:
        return
    from huggingface_hub import hf_hub_download

    missing = [each for each in downloads if each.sizes]
    if missing:
        download(missing, quiet)
    for each in downloads:
        # This call records the revision's commit in the cache. It comes last, so a recorded revision is complete.
        with contextlib.suppress(Exception), _progress_bars(quiet):
            hf_hub_download(each.hub_id.repo, each.first, revision=each.hub_id.revision)


def choose_files(
    hub_id: HubId, names: Sequence[str], weights_only: bool = False, carry: Sequence[str] = ()
) -> RepositoryFiles:
    """Choose the files of a repository that a merge needs, except custom code, which `_missing_code` finds.

    Args:
        hub_id: The repository, for messages.
        names: The names of all its files.
        weights_only: As for `fetch`.
        carry: As for `fetch`.

    Raises:
        CheckpointError: The repository has no weights in a form that can be read.
    """
    present = set(names)
    form = next((file for file, beside in WEIGHT_FORMS if present.issuperset((file, *beside))), None)
    if form is None:
        raise CheckpointError(_no_weights(hub_id, names))
    about = (*ABOUT_WEIGHTS, *(TOKENS if "tokenizer.json" not in present else ()), form)
    others = [name for name in about if name in present and (name in INDEXES or name != form)]
    if not weights_only:
        readme = [CARD] if CARD in present else []
        others = list(dict.fromkeys((*others, *readme, *sort_files(sorted(names), carry=carry).carried)))
    return RepositoryFiles([], form, others) if form in INDEXES else RepositoryFiles([form], None, others)


def _no_weights(hub_id: HubId, names: Sequence[str]) -> str:
    """Return the message for a repository without weights that can be read."""
    found = [name for name in names if name.endswith(OTHER_WEIGHTS)] or list(names)
    kinds = " (GGUF)" if any(name.endswith(".gguf") for name in found) else ""
    return (
        f"{hub_id}: no weights that can be read. The file has to be {', '.join(form for form, _ in WEIGHT_FORMS)}, "
        f"but the repository has {list_names(found) or 'no files at all'}{kinds}; give the repository that it was made "
        "from"
    )


def _download(
    hub_id: HubId,
    commit: str,
    sizes: Mapping[str, int | None],
    weights_only: bool,
    headers_folder: str | None,
    carry: Sequence[str],
    later: list[Download],
) -> Snapshot:
    """Download a commit's files except its weights; see `fetch`.

    Args:
        hub_id: The repository.
        commit: The commit's hash.
        sizes: The sizes in bytes of all the repository's files, by their names; None where a size is not known.
        weights_only: As for `fetch`.
        headers_folder: As for `fetch`.
        carry: As for `fetch`.
        later: The list that receives the download of the weights.
    """
    repo, names = hub_id.repo, list(sizes)
    files = choose_files(hub_id, names, weights_only, carry)
    first = files.others or files.weights
    folder = _download_small_files(repo, commit, first, [] if weights_only else names)
    weights = _indexed_weights(hub_id, folder, files.index_file, names) if files.index_file else files.weights
    missing = _missing(folder, weights)
    if headers_folder is not None and missing:
        fill_stand_in(hub_id, commit, folder, {name: sizes[name] for name in missing}, headers_folder)
        return Snapshot(folder, repo, commit)
    later.append(Download(hub_id, commit, folder, first[0], {name: sizes[name] for name in missing}))
    return Snapshot(folder, repo, commit)


def _download_small_files(repo: str, commit: str, files: Sequence[str], names: Iterable[str]) -> str:
    """Download the files beside the weights, and the custom code among `names` that they need; return the snapshot.

    Code may import further code, which is known only after a download, so this repeats until nothing is missing.
    """
    from huggingface_hub import snapshot_download

    needed, requested = list(files), set[str]()
    while needed:
        requested.update(needed)
        folder = snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in needed])
        needed = [name for name in _missing_code(folder, names) if name not in requested]
    return folder


def _missing(folder: str, names: Iterable[str]) -> list[str]:
    """Return the names of files that a snapshot does not have."""
    return [name for name in names if not os.path.exists(os.path.join(folder, name))]


def _missing_code(folder: str, names: Iterable[str]) -> list[str]:
    """Return the custom code among a repository's files that the snapshot needs and does not have."""
    found = find_code({name: os.path.join(folder, name) for name in names}).files
    return _missing(folder, sort_files(sorted(found), Code(found)).carried)


def _indexed_weights(hub_id: HubId, folder: str, index_file: str, names: Sequence[str]) -> list[str]:
    """Return the weight files that a snapshot's index names, in alphabetical order.

    Raises CheckpointError if the index is damaged, or if it names a file that is not among the repository's `names`.
    """
    weight_map = load_json(os.path.join(folder, index_file)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{hub_id}: {index_file} has no weight_map object that gives each tensor its file")
    weights = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in weights if name not in names]
    if missing:
        raise CheckpointError(
            f"{hub_id}: {index_file} names {list_names(missing)}, which the repository does not have; give a revision "
            "that is complete"
        )
    return weights


def _find_in_cache(hub_id: HubId, weights_only: bool, carry: Sequence[str], error: Exception) -> Snapshot:
    """Return the revision's snapshot from the cache, if it is complete.

    Args:
        hub_id: The repository and the revision.
        weights_only: As for `fetch`.
        carry: As for `fetch`.
        error: The reason why the hub could not be asked.

    Raises:
        CheckpointError: The cache lacks files that are needed; the message has the reason too.
    """
    from huggingface_hub import constants, errors, snapshot_download

    folder = None
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True, allow_patterns=[])
    missing = _missing_in_cache(hub_id, folder, weights_only, carry) if folder else []
    if folder and not missing:
        return Snapshot(folder, hub_id.repo, os.path.basename(folder))
    fact = f"lacks {list_names(missing)}" if folder else "has nothing of it"
    reason, fix = explain_unreachable(error)
    raise CheckpointError(f"{hub_id}: {reason}, and the cache {constants.HF_HUB_CACHE} {fact}; {fix}")


def _missing_in_cache(hub_id: HubId, folder: str, weights_only: bool, carry: Sequence[str]) -> list[str]:
    """Return the names of needed files that a snapshot does not have."""
    names = _known_files(hub_id, folder)
    try:
        files = choose_files(hub_id, names, weights_only, carry)
    except CheckpointError:
        return ["weights that can be read"]
    code = [] if weights_only else _missing_code(folder, names)
    missing = _missing(folder, dict.fromkeys((*files.others, *code, *files.weights)))
    if files.index_file and files.index_file not in missing:
        weight_map = load_json(os.path.join(folder, files.index_file)).get("weight_map")
        weights = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing += _missing(folder, weights)
    return missing


def _known_files(hub_id: HubId, folder: str) -> list[str]:
    """Return the names of a commit's files: all of them if huggingface_hub has recorded them in the cache.

    Older versions of huggingface_hub record nothing; then only the files in the snapshot are known.
    """
    try:
        from huggingface_hub import get_cached_repo_tree

        return [file.path for file in get_cached_repo_tree(hub_id.repo, revision=os.path.basename(folder))]
    except Exception:
        return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def _progress_bars(quiet: bool) -> Iterator[None]:
    """Switch the progress bars of huggingface_hub off for the block if `quiet` is set."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # The environment variable takes precedence over calls, so there is nothing to switch where it is set.
    if not quiet or are_progress_bars_disabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
