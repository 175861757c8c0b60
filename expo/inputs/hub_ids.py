"""Names of checkpoints on the Hugging Face hub: ids that users type, and snapshot folders in the hub's cache."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_PART = r"(?=[\w.-]{1,96}(?:[/@]|$))\w(?:[\w.-]*\w)?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([^\s~^:?*\[\\\x00-\x1f\x7f]+))?", re.ASCII)
_FILE_SUFFIXES = (".git", ".safetensors", ".bin", ".pt", ".pth")  # endings of paths; no repository's name has one
_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})(?=/|$)", re.ASCII)


class HubId(NamedTuple):
    """A repository of the hub at a revision.

    Attributes:
        repo: The repository, "org/name".
        revision: A branch, a tag or a commit; None for the hub's default, main.
    """

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision or 'main'}"

    @property
    def typed(self) -> str:
        """The shortest text that means this hub id."""
        return str(self) if self.revision else self.repo


class Snapshot(NamedTuple):
    """A folder of the hub's cache with the files of one commit that have been downloaded.

    Attributes:
        folder: The folder's path.
        repo: The repository, "org/name".
        commit: The commit's hash.
    """

    folder: str
    repo: str
    commit: str


def parse_hub_id(text: str) -> HubId | None:
    """Return the hub id that `org/name` or `org/name@revision` means, or None if the text cannot be one.

    The caller first checks that no file or folder has this name: a path goes before a hub id.
    """
    match = _ID.fullmatch(text)
    if match is None:
        return None
    repo, revision = match.groups()
    if "--" in repo or ".." in text or repo.endswith(_FILE_SUFFIXES):
        return None
    if revision is not None and (revision.startswith(("/", "-")) or revision.endswith("/") or "//" in revision):
        return None
    return HubId(repo, revision)


def snapshot_origin(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the repository and the commit of a snapshot folder in a hub's cache, or of a path inside one.

    Returns None for any other path.
    """
    # The path as given is tried first: a file in a snapshot is a link, and its real path does not name the snapshot.
    for candidate in (os.path.abspath(path), os.path.realpath(path)):
        match = _SNAPSHOT.search(candidate)
        if match:
            return match[1].replace("--", "/", 1), match[2]
    return None
