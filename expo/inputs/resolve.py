"""The two inputs of a merge, as the user names them: folders, files, hub ids, an adapter, a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..checkpoints.checkpoint import Checkpoint, Origin, open_checkpoint
from ..checkpoints.files import ADAPTER_CONFIG, CONFIG, INDEX, find_other_files, find_strays
from ..checkpoints.sidecars import TEMPLATES, TOKENIZER, VOCABULARIES
from ..checkpoints.wrappers import without_wrapper
from ..errors import CheckpointError, UsageError

StrPath = str | os.PathLike[str]


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
        given = (("--sft", sft), ("--aligned", aligned), ("--alpha", alpha))
        *first, last = [name for name, value in given if value is None]
        lacking = f"{', '.join(first)} and {last}" if first else last
        raise UsageError(f"{lacking} must be given, or --recipe gives all three")
    return Wanted(sft, aligned, alphas_of(alpha))


def alphas_of(alpha: float | Iterable[float]) -> tuple[float, ...]:
    """One number or several, as a tuple of floats. Raises UsageError."""
    try:
        values = tuple(alpha) if isinstance(alpha, Iterable) and not isinstance(alpha, str) else (alpha,)
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


class _Found(NamedTuple):
    """folder: where the files are, or the one file. headers: a folder to open in its place, with no weights' data."""

    folder: str
    origin: Origin | None
    headers: str | None = None

    @property
    def place(self) -> str:
        return self.headers or self.folder


@contextmanager
def open_inputs(
    sft: StrPath, aligned: StrPath, quiet: bool = True, headers_only: bool = False, carry: Sequence[str] = ()
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints; hub ids are downloaded first, and an adapter is opened over sft. Raises CheckpointError.

    quiet: without the download's progress bars. headers_only: of weights on the hub that are not in the cache, only the
    headers are downloaded, and zeros stand for their data. carry: patterns of further files that are wanted of aligned.
    """
    with ExitStack() as stack:
        stand_ins = stack if headers_only else None
        found = _fetched(aligned, False, quiet, stand_ins, carry)
        adapter = _is_adapter(found.place)
        below = _fetched(
            sft, not adapter, quiet, stand_ins, carry
        )  # an adapter's tokenizer and config may be its base's
        weak = stack.enter_context(closing(_opened(below)))
        if adapter:
            weak = without_wrapper(weak, weak)
            strong = stack.enter_context(closing(_over(weak, found, below.headers is None)))
        else:
            strong = without_wrapper(stack.enter_context(closing(_opened(found))), weak)
        yield weak, strong


@contextmanager
def open_one(path: StrPath, quiet: bool = True) -> Iterator[Checkpoint]:
    """A checkpoint alone, as sft may be named: no adapter. Raises CheckpointError."""
    with closing(_opened(_fetched(path, True, quiet))) as checkpoint:
        yield checkpoint


def _fetched(
    path: StrPath, weights_only: bool, quiet: bool, stand_ins: ExitStack | None = None, carry: Sequence[str] = ()
) -> _Found:
    """Where the files are, and where they come from: what exists is a path, and what does not may be a hub id.

    stand_ins: takes a folder with headers that are fetched in place of weights; without it weights are fetched.
    """
    from . import hub

    path = os.fspath(path)
    if os.path.lexists(path):
        found = hub.origin(path)
        return _Found(path, Origin(*found) if found else None)
    hub_id = hub.parse(path)
    if hub_id is None:
        return _Found(path, None)
    try:
        headers = stand_ins.enter_context(hub.stand_in(hub_id)) if stand_ins else None
        snapshot = hub.fetch(hub_id, weights_only, quiet, headers, carry)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no such file or folder; as a hub id: {error}") from error
    origin = Origin(snapshot.repo, snapshot.commit)
    return _Found(snapshot.folder, origin, headers if headers and os.listdir(headers) else None)


def _opened(found: _Found) -> Checkpoint:
    """A whole checkpoint, as if its weights were in its folder."""
    checkpoint = replace(open_checkpoint(found.place), origin=found.origin)
    if found.headers is None:
        return checkpoint
    files = find_other_files(found.folder, {*checkpoint.shards, INDEX})
    strays = find_strays(found.folder, files)
    return replace(checkpoint, path=found.folder, folder=found.folder, files=files, strays=strays)


def _is_adapter(folder: str) -> bool:
    if not os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    from ..checkpoints.lora import is_adapter

    return is_adapter(folder)


def _over(base: Checkpoint, found: _Found, has_data: bool = True) -> Checkpoint:
    """The checkpoint that an adapter makes of its base: the base's files and names, its own tokenizer where it has one.

    has_data: of the base; where either has headers alone, what the adapter repeats of the base is not compared.
    Raises CheckpointError.
    """
    from ..checkpoints.lora import open_adapter
    from ..checkpoints.lora_data import check_copies
    from ..checkpoints.lora_ties import settled, tie_of, with_head

    folder = found.folder
    tie = tie_of(base)
    whole = with_head(base, tie)
    adapter = open_adapter(found.place, whole.tensors)
    try:
        if has_data and found.headers is None:
            check_copies(adapter, whole.tensors, whole.reader)
        adapter = settled(adapter, tie, base, found.headers is None)
    except BaseException:
        adapter.shard.reader.close()
        raise
    made = whole if adapter.unties else base
    tensors = {name: adapter.full.get(name, tensor) for name, tensor in made.tensors.items()}
    files, strays = _files(base, folder, os.path.basename(adapter.shard.path)) if base.folder is not None else ({}, {})
    return replace(
        made, path=folder, tensors=tensors, files=files, strays=strays, origin=found.origin, adapter=adapter
    )  # fmt: skip


def _files(base: Checkpoint, folder: str, weights: str) -> tuple[dict[str, str], dict[str, str]]:
    """The base's files and in their place the adapter's own; and which of them are links out of their folders.

    A tokenizer is replaced as a whole: the chat template or the special tokens of the base's would go before its own.
    The model's config is the base's, as the weights are: an adapter may keep one of the base as it was quantised.
    """
    own = find_other_files(folder, {ADAPTER_CONFIG, CONFIG, weights})
    without = {*own, ADAPTER_CONFIG}  # the base may keep the config of an adapter that was merged into it
    if VOCABULARIES & set(own):
        without |= {name for name in base.files if os.path.dirname(name) == TEMPLATES or name in TOKENIZER}
    kept = {name: path for name, path in base.files.items() if name not in without}
    strays = {name: place for name, place in base.strays.items() if name in kept} | find_strays(folder, own)
    return dict(sorted({**kept, **own}.items())), strays
