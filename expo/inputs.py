"""The two inputs of a merge, as the user names them: folders, files, hub ids, an adapter, a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from .checkpoint import Checkpoint, Origin, open_checkpoint, open_file, other_files
from .errors import CheckpointError, UsageError

StrPath = str | os.PathLike[str]
ADAPTER_CONFIG = "adapter_config.json"


class Wanted(NamedTuple):
    """What to merge: both checkpoints as the user names them, and one alpha or several."""

    sft: StrPath
    aligned: StrPath
    alphas: tuple[float, ...]


def wanted(
    sft: StrPath | None, aligned: StrPath | None, alpha: float | Iterable[float] | None, recipe: str | None
) -> Wanted:
    """The arguments, with what a recipe gives where one is left out. Raises UsageError."""
    if recipe is not None:
        from .recipes import recipe as find

        found = find(recipe)
        sft, aligned = found.sft if sft is None else sft, found.aligned if aligned is None else aligned
        alpha = found.alpha if alpha is None else alpha
    if sft is None or aligned is None or alpha is None:
        lacking = [name for name, value in (("sft", sft), ("aligned", aligned), ("alpha", alpha)) if value is None]
        raise UsageError(f"{' and '.join(f'--{name}' for name in lacking)} must be given, or --recipe gives all three")
    return Wanted(sft, aligned, alphas_of(alpha))


def alphas_of(alpha: float | Iterable[float]) -> tuple[float, ...]:
    """One number or several, as a tuple of floats. Raises UsageError."""
    try:
        values = tuple(alpha) if isinstance(alpha, Iterable) and not isinstance(alpha, str) else (alpha,)
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


@contextmanager
def open_inputs(sft: StrPath, aligned: StrPath, quiet: bool = True) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints; hub ids are downloaded first, and an adapter is opened over sft. Raises CheckpointError.

    quiet: without the download's progress bars.
    """
    folder, origin = _fetched(aligned, False, quiet)
    adapter = _is_adapter(folder)
    below, below_origin = _fetched(sft, not adapter, quiet)  # an adapter's tokenizer and config may be its base's
    with ExitStack() as stack:
        weak = stack.enter_context(closing(_known(open_checkpoint(below), below_origin)))
        strong = _over(weak, folder, origin) if adapter else _known(open_checkpoint(folder), origin)
        yield weak, stack.enter_context(closing(strong))


def _fetched(path: StrPath, weights_only: bool, quiet: bool) -> tuple[str, Origin | None]:
    """Where the files are, and where they come from: what exists is a path, and what does not may be a hub id."""
    from . import hub

    path = os.fspath(path)
    if os.path.lexists(path):
        found = hub.origin(path)
        return path, Origin(*found) if found else None
    hub_id = hub.parse(path)
    if hub_id is None:
        return path, None
    try:
        snapshot = hub.fetch(hub_id, weights_only, quiet)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no such file or folder; as a hub id: {error}") from error
    return snapshot.folder, Origin(snapshot.repo, snapshot.commit)


def _known(checkpoint: Checkpoint, origin: Origin | None) -> Checkpoint:
    return checkpoint if origin is None else replace(checkpoint, origin=origin)


def _is_adapter(folder: str) -> bool:
    if not os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    from .adapter import is_adapter

    return is_adapter(folder)


def _over(base: Checkpoint, folder: str, origin: Origin | None) -> Checkpoint:
    """The checkpoint that an adapter makes of its base: the base's files and names, its own tokenizer where it has one.

    Raises CheckpointError.
    """
    from .adapter import check_copies, open_adapter

    adapter = open_adapter(folder, base.tensors, open_file)
    try:
        check_copies(adapter, base.tensors, base.reader)
    except BaseException:
        adapter.shard.reader.close()
        raise
    own = other_files(folder, {ADAPTER_CONFIG, os.path.basename(adapter.shard.path)})
    files = {**base.files, **own} if base.folder is not None else {}
    tensors = {name: adapter.full.get(name, tensor) for name, tensor in base.tensors.items()}
    return replace(
        base, path=folder, tensors=tensors, files=dict(sorted(files.items())), origin=origin, adapter=adapter
    )  # fmt: skip
