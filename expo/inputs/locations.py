"""Find the files that a user's name means, and open the checkpoint at that place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.checkpoint import Checkpoint, Origin, open_checkpoint
from ..checkpoints.dequantized import dequantized
from ..checkpoints.files import ADAPTER_CONFIG, INDEX, find_other_files, find_strays
from ..errors import CheckpointError
from .hints import explain_hidden, explain_missing, hidden_by_folder, note_hidden
from .hub_ids import HubId, parse_hub_id, snapshot_origin

if TYPE_CHECKING:
    from .downloads import Download

StrPath = str | os.PathLike[str]


class Location(NamedTuple):
    """The place of a checkpoint's files.

    Attributes:
        path: The folder with the files, or the one file.
        origin: The repository and the commit that the files come from; None for other files.
        stand_in: A folder to open in its place, with the headers of the weights and no data (see hub_headers.py); None
            if the weights themselves are there.
        hidden: The hub id that the user's name would be if no folder had this name; None for other names.
    """

    path: str
    origin: Origin | None
    stand_in: str | None = None
    hidden: HubId | None = None

    @property
    def path_to_open(self) -> str:
        return self.stand_in or self.path


def locate(
    name: StrPath,
    weights_only: bool,
    quiet: bool,
    stand_ins: ExitStack | None = None,
    carry: Sequence[str] = (),
    later: list[Download] | None = None,
) -> Location:
    """Find the files that a name means, and download them if the name is no path but a hub id.

    Args:
        name: A path or a hub id; a path that exists takes precedence.
        weights_only: Download only what a merge needs of sft.
        quiet: Show no progress bars.
        stand_ins: A stack, if headers are to be downloaded in place of weights: it removes their temporary folder at
            its end. None to download the weights.
        carry: Patterns of further files to download.
        later: A list that receives the downloads of weights; None to download them in this call.

    Raises:
        CheckpointError: The hub id's files cannot be downloaded, or the name is an address or has a `~`.
    """
    path = os.fspath(name)
    if os.path.lexists(path):
        found = snapshot_origin(path)
        if found is not None:
            return Location(path, Origin(*found))
        return Location(path, None, hidden=hidden_by_folder(path))
    hub_id = parse_hub_id(path)
    if hub_id is None:
        hint = explain_missing(path)
        if hint is not None:
            raise CheckpointError(f"{path}: no such file or folder; {hint}")
        return Location(path, None)
    from . import hub, hub_headers

    try:
        stand_in = stand_ins.enter_context(hub_headers.stand_in_folder(hub_id)) if stand_ins else None
        snapshot = hub.fetch(hub_id, weights_only, quiet, stand_in, carry, later)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no such file or folder; as a hub id: {error}") from error
    is_used = stand_in is not None and bool(os.listdir(stand_in))
    return Location(snapshot.folder, Origin(snapshot.repo, snapshot.commit), stand_in if is_used else None)


def complete_downloads(later: list[Download], quiet: bool) -> None:
    """Download the weights that `locate` has left for later. Raises CheckpointError."""
    if later:
        from .hub import complete

        complete(later, quiet)


def open_location(location: Location) -> Checkpoint:
    """Open the checkpoint at a location. Its paths are those of the real files, also if a stand-in is opened."""
    try:
        opened = dequantized(open_checkpoint(location.path_to_open, has_data=location.stand_in is None))
    except CheckpointError as error:
        hint = explain_hidden(location.path, location.hidden) if location.hidden else None
        if hint is not None:
            error.add_hints(hint)
        raise
    checkpoint = replace(opened, origin=location.origin, notes=(*opened.notes, *location_notes(location)))
    if location.stand_in is None:
        return checkpoint
    folder = location.path
    files = find_other_files(folder, {*checkpoint.shards, INDEX})
    return replace(checkpoint, path=folder, folder=folder, files=files, strays=find_strays(folder, files))


def location_notes(location: Location) -> tuple[str, ...]:
    """Return a note if a folder is used in the place of a repository of the hub that is known."""
    note = note_hidden(location.path, location.hidden) if location.hidden else None
    return (note,) if note else ()


def is_adapter_folder(folder: str) -> bool:
    """Return True if a folder has an adapter and no whole model; see `lora.is_adapter`."""
    if not os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    from ..checkpoints.lora import is_adapter

    return is_adapter(folder)
