"""Open an adapter over its base: a checkpoint with the base's tensors and files, and the adapter's own in place."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoints.adapter import find_deltas, find_whole
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import ADAPTER_CONFIG, CONFIG, find_other_files, find_strays
from ..checkpoints.sidecars import TEMPLATES, TOKENIZER, VOCABULARIES
from .locations import Location, location_notes

if TYPE_CHECKING:
    from ..checkpoints.adapter import Adapter


def open_adapted(base: Checkpoint, location: Location, base_has_data: bool, unties: bool = False) -> Checkpoint:
    """Open an adapter over its base: the checkpoint has the base's tensors and files, with the adapter's own in place.

    Args:
        base: The checkpoint that the adapter was trained on. It may be an adapter over its base too.
        location: The adapter's place.
        base_has_data: False if the base has headers alone. Copies of the base's tensors in the adapter are compared
            with the base only if both have their data.
        unties: True if the checkpoint must have the head and the embedding as two tensors, because sft has.

    Raises:
        CheckpointError: The adapter is damaged, of a kind that cannot be read, or was trained on another base.
    """
    from ..checkpoints.lora import open_adapter
    from ..checkpoints.lora_data import check_copies
    from ..checkpoints.lora_ties import add_head, find_tie, settle_tie

    folder, has_data = location.path, location.stand_in is None
    tie = None if any(adapter.unties for adapter in base.adapters) else find_tie(base)
    base_with_head = add_head(base, tie)
    adapter = open_adapter(location.path_to_open, base_with_head.tensors, base.config)
    try:
        if base_has_data and has_data:
            check_copies(_without_changed_copies(adapter, base), base_with_head.tensors, base_with_head.reader)
        adapter = settle_tie(adapter, tie._replace(stored=True) if tie and unties else tie, base, has_data)
    except BaseException:
        adapter.shard.reader.close()
        raise
    adapter = replace(adapter, unties=True) if tie and unties else adapter
    adapter = replace(adapter, base_dtypes={name: _base_dtype(base_with_head, name) for name in adapter.full})
    adapted = base_with_head if adapter.unties else base
    own = {name: tensor._replace(name=name) for name, tensor in adapter.full.items()}
    tensors = {name: own.get(name, tensor) for name, tensor in adapted.tensors.items()}
    files, strays = ({}, {}) if base.folder is None else _adapted_files(base, folder, adapter.shard.path)
    return replace(
        adapted, path=folder, tensors=tensors, files=files, strays=strays, origin=location.origin,
        adapters=(*base.adapters, adapter), notes=(*adapted.notes, *location_notes(location)),
    )  # fmt: skip


def _without_changed_copies(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter without its copies of tensors to which an earlier adapter adds a delta.

    Such a copy has the sum, rounded in the training, so it is not the tensor of a file.
    """
    copies = {name: copy for name, copy in adapter.copies.items() if not find_deltas(base.adapters, name)}
    return replace(adapter, copies=copies)


def _base_dtype(base: Checkpoint, name: str) -> str:
    """Return the dtype that a tensor has below all adapters."""
    whole = find_whole(base.adapters, name)
    return whole.base_dtypes[name] if whole else base.tensors[name].dtype


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
