"""Open the two inputs of a merge by the names that a user types: folders, files, hub ids, a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.checkpoint import Checkpoint, Origin, open_checkpoint
from ..checkpoints.dequantized import dequantized
from ..checkpoints.files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    WHOLE_MODELS,
    find_other_files,
    find_strays,
    load_json,
)
from ..checkpoints.sidecars import TEMPLATES, TOKENIZER, VOCABULARIES
from ..checkpoints.transposed import transposed_like
from ..checkpoints.wrappers import remove_wrapper
from ..errors import CheckpointError, UsageError
from .hints import explain_hidden, explain_missing, hidden_by_folder, note_hidden
from .hub_ids import HubId, parse_hub_id, snapshot_origin

if TYPE_CHECKING:
    from .downloads import Download

StrPath = str | os.PathLike[str]


class PairRequest(NamedTuple):
    """The two checkpoints of a merge as the user names them, and its alphas."""

    sft: StrPath
    aligned: StrPath
    alphas: tuple[float, ...]


def complete_request(
    sft: StrPath | None, aligned: StrPath | None, alpha: float | Iterable[float] | None, recipe: str | None
) -> PairRequest:
    """Return the user's arguments, completed by a recipe's values for those that are None.

    Raises UsageError if there is no such recipe, if the recipe has no alpha and none is given, if an argument is still
    missing, or if alpha is not a number.
    """
    if recipe is not None:
        from .recipes import alpha_of
        from .recipes import recipe as find_recipe

        found = find_recipe(recipe)
        sft, aligned = found.sft if sft is None else sft, found.aligned if aligned is None else aligned
        alpha = alpha_of(found) if alpha is None else alpha
    if sft is None or aligned is None or alpha is None:
        arguments = (("`sft`", sft), ("`aligned`", aligned), ("`alpha`", alpha))
        *first, last = [name for name, value in arguments if value is None]
        missing = f"{', '.join(first)} and {last}" if first else last
        raise UsageError(f"{missing} must be given, or `recipe` gives all three")
    return PairRequest(sft, aligned, alphas_of(alpha))


def alphas_of(alpha: float | Iterable[float]) -> tuple[float, ...]:
    """Return one number or several as a tuple of floats. Raises UsageError."""
    try:
        values = tuple(alpha) if isinstance(alpha, Iterable) and not isinstance(alpha, str) else (alpha,)
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


class _Location(NamedTuple):
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


@contextmanager
def open_inputs(
    sft: StrPath,
    aligned: StrPath,
    quiet: bool = True,
    headers_only: bool = False,
    carry: Sequence[str] = (),
    aligned_config: StrPath | None = None,
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Open both checkpoints for the time of the block. Hub ids are downloaded first; an adapter is opened over sft.

    Args:
        sft: A folder, a file or a hub id.
        aligned: The same, or the folder or the hub id of a LoRA adapter.
        quiet: Show no progress bars of downloads.
        headers_only: Download only the headers of weights that are not in the hub's cache; their data are then zeros.
        carry: Patterns of further files of aligned that the output takes over.
        aligned_config: The folder with the config and the files of an aligned that has none; None for those beside it.

    Yields:
        sft and aligned. aligned, and the base of an adapter, have the tensor names of models without a wrapper.

    Raises:
        CheckpointError: An input is missing, damaged, or of a kind that cannot be read.
    """
    with ExitStack() as stack:
        stand_ins = stack if headers_only else None
        later: list[Download] = []  # the weights of both are downloaded at the same time
        aligned_location = _locate(aligned, False, quiet, stand_ins, carry, later)
        has_adapter = _is_adapter(aligned_location.path_to_open)
        # The tokenizer and the config of an adapter's output may be those of its base, so all files of sft are needed.
        sft_location = _locate(sft, not has_adapter, quiet, stand_ins, carry, later)
        if later:
            from .hub import complete

            complete(later, quiet)
        opened_sft = stack.enter_context(closing(_open(sft_location)))
        if has_adapter:
            opened_sft = remove_wrapper(opened_sft, opened_sft)
            adapted = _open_adapted(opened_sft, aligned_location, sft_location.stand_in is None)
            opened_aligned = stack.enter_context(closing(adapted))
        else:
            opened_aligned = stack.enter_context(closing(_open(aligned_location)))
            if aligned_config is not None:
                opened_aligned = _with_config(opened_aligned, os.fspath(aligned_config))
            opened_aligned = remove_wrapper(opened_aligned, opened_sft)
            opened_sft = transposed_like(opened_sft, opened_aligned)
        yield opened_sft, opened_aligned


def _with_config(aligned: Checkpoint, folder: str) -> Checkpoint:
    """Return aligned with the config and the files of a folder.

    Raises:
        UsageError: aligned has a config of its own.
        CheckpointError: The folder has no config.
    """
    if not aligned.in_parts:
        raise UsageError(
            f"`aligned_config` is for weights in the parts that a training's processes saved, and aligned "
            f"{aligned.path} has none: leave it out"
        )
    files = find_other_files(folder, {*aligned.shards, *WHOLE_MODELS})
    if CONFIG not in files:
        raise CheckpointError(f"{folder}: `aligned_config` needs a folder with {CONFIG}, and there is none in it")
    return replace(aligned, config=load_json(files[CONFIG]), files=files, strays=find_strays(folder, files))


@contextmanager
def open_one(path: StrPath, quiet: bool = True) -> Iterator[Checkpoint]:
    """Open one checkpoint for the time of the block: a folder, a file or a hub id, but no adapter.

    Raises CheckpointError.
    """
    with closing(_open(_locate(path, True, quiet))) as checkpoint:
        yield checkpoint


def _locate(
    name: StrPath,
    weights_only: bool,
    quiet: bool,
    stand_ins: ExitStack | None = None,
    carry: Sequence[str] = (),
    later: list[Download] | None = None,
) -> _Location:
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
            return _Location(path, Origin(*found))
        return _Location(path, None, hidden=hidden_by_folder(path))
    hub_id = parse_hub_id(path)
    if hub_id is None:
        hint = explain_missing(path)
        if hint is not None:
            raise CheckpointError(f"{path}: no such file or folder; {hint}")
        return _Location(path, None)
    from . import hub, hub_headers

    try:
        stand_in = stand_ins.enter_context(hub_headers.stand_in_folder(hub_id)) if stand_ins else None
        snapshot = hub.fetch(hub_id, weights_only, quiet, stand_in, carry, later)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no such file or folder; as a hub id: {error}") from error
    is_used = stand_in is not None and bool(os.listdir(stand_in))
    return _Location(snapshot.folder, Origin(snapshot.repo, snapshot.commit), stand_in if is_used else None)


def _open(location: _Location) -> Checkpoint:
    """Open the checkpoint at a location. Its paths are those of the real files, also if a stand-in is opened."""
    try:
        opened = dequantized(open_checkpoint(location.path_to_open, has_data=location.stand_in is None))
    except CheckpointError as error:
        hint = explain_hidden(location.path, location.hidden) if location.hidden else None
        if hint is not None:
            error.add_hints(hint)
        raise
    checkpoint = replace(opened, origin=location.origin, notes=(*opened.notes, *_notes(location)))
    if location.stand_in is None:
        return checkpoint
    folder = location.path
    files = find_other_files(folder, {*checkpoint.shards, INDEX})
    return replace(checkpoint, path=folder, folder=folder, files=files, strays=find_strays(folder, files))


def _notes(location: _Location) -> tuple[str, ...]:
    """Return a note if a folder is used in the place of a repository of the hub that is known."""
    note = note_hidden(location.path, location.hidden) if location.hidden else None
    return (note,) if note else ()


def _is_adapter(folder: str) -> bool:
    """Return True if a folder has an adapter and no whole model; see `lora.is_adapter`."""
    if not os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    from ..checkpoints.lora import is_adapter

    return is_adapter(folder)


def _open_adapted(base: Checkpoint, location: _Location, base_has_data: bool) -> Checkpoint:
    """Open an adapter over its base: the checkpoint has the base's tensors and files, with the adapter's own in place.

    Args:
        base: The checkpoint that the adapter was trained on.
        location: The adapter's place.
        base_has_data: False if the base has headers alone. Copies of the base's tensors in the adapter are compared
            with the base only if both have their data.

    Raises:
        CheckpointError: The adapter is damaged, of a kind that cannot be read, or was trained on another base.
    """
    from ..checkpoints.lora import open_adapter
    from ..checkpoints.lora_data import check_copies
    from ..checkpoints.lora_ties import add_head, find_tie, settle_tie

    folder, has_data = location.path, location.stand_in is None
    tie = find_tie(base)
    base_with_head = add_head(base, tie)
    adapter = open_adapter(location.path_to_open, base_with_head.tensors, base.config)
    try:
        if base_has_data and has_data:
            check_copies(adapter, base_with_head.tensors, base_with_head.reader)
        adapter = settle_tie(adapter, tie, base, has_data)
    except BaseException:
        adapter.shard.reader.close()
        raise
    adapted = base_with_head if adapter.unties else base
    tensors = {name: adapter.full.get(name, tensor) for name, tensor in adapted.tensors.items()}
    files, strays = ({}, {}) if base.folder is None else _adapted_files(base, folder, adapter.shard.path)
    return replace(
        adapted, path=folder, tensors=tensors, files=files, strays=strays, origin=location.origin, adapter=adapter,
        notes=(*adapted.notes, *_notes(location)),
    )  # fmt: skip


def _adapted_files(base: Checkpoint, folder: str, weights: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the base's files with the adapter's own in their place, and the links out of either folder among them.

    An adapter's tokenizer replaces the base's as a whole: transformers would prefer the base's chat template and
    special tokens to those of the adapter. The model's config is always the base's, as the weights are: an adapter may
    have the config of a quantised copy of its base.

    Args:
        base: The checkpoint that the adapter was trained on.
        folder: The adapter's folder.
        weights: The path of the adapter's weights.
    """
    own = find_other_files(folder, {ADAPTER_CONFIG, CONFIG, os.path.basename(weights)})
    replaced = {*own, ADAPTER_CONFIG}  # the base may have the config of an adapter that was merged into it
    if VOCABULARIES & set(own):
        replaced |= {name for name in base.files if os.path.dirname(name) == TEMPLATES or name in TOKENIZER}
    kept = {name: path for name, path in base.files.items() if name not in replaced}
    strays = {name: target for name, target in base.strays.items() if name in kept} | find_strays(folder, own)
    return dict(sorted({**kept, **own}.items())), strays
