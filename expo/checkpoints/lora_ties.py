"""Adapters over a base whose head is its embedding: an adapter may turn this one matrix into two tensors.

PEFT trains copies. With `modules_to_save=["embed_tokens"]` it trains a copy of the embedding, and the head stays the
base's; LoRA on one of the two changes that one alone. Then the trained model has a head of its own, though its files
were tied. `ensure_weight_tying` in the adapter's config makes PEFT train both as one. Source:
github.com/huggingface/peft, tuners/tuners_utils.py and utils/other.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ..errors import CheckpointError
from .adapter import Adapter, LowRank
from .checkpoint import Checkpoint
from .lora_config import TIED_ELSEWHERE
from .lora_data import are_equal
from .lora_file import names_without_wrappers
from .model_parts import HEAD, generates, is_embedding, tie_flag
from .safetensors_header import TensorInfo

# The head's name in a model whose embedding has this name. Other models have no head, or one of several parts.
_HEADS = (
    (re.compile(r"^(model|transformer|model\.decoder|model\.language_model)\.(embed_tokens|wte|word_embeddings)\.weight$"),
     "lm_head.weight"),
    (re.compile(r"^backbone\.embeddings?\.weight$"), "lm_head.weight"),
    (re.compile(r"^language_model\.model\.embed_tokens\.weight$"), "language_model.lm_head.weight"),
    (re.compile(r"^gpt_neox\.embed_in\.weight$"), "embed_out.weight"),
)  # fmt: skip
Change = TypeVar("Change", TensorInfo, LowRank)


class Tie(NamedTuple):
    """The tie of a base: one matrix under two names.

    Attributes:
        embedding: The name of the embedding.
        head: The name of the head.
        stored: True if a file of the base has the head too.
    """

    embedding: str
    head: str
    stored: bool


def find_tie(base: Checkpoint) -> Tie | None:
    """Return the tie of a base whose head is its embedding; None if it has a head of its own, or no head."""
    if not generates(base.config):
        return None
    heads = [name for name in base.tensors if HEAD.search(name)]
    flag = tie_flag(base.config)
    if flag is False or (heads and flag is None):
        return None
    pairs = [(name, head) for name in base.tensors for pattern, head in _HEADS if pattern.search(name)]
    if len(pairs) != 1 or heads not in ([], [pairs[0][1]]):
        return None
    return Tie(*pairs[0], bool(heads))


def add_head(base: Checkpoint, tie: Tie | None) -> Checkpoint:
    """Return the base with the head as a tensor of its own, unless it has one; the head has the embedding's bytes."""
    if tie is None or tie.stored:
        return base
    return replace(
        base,
        tensors={**base.tensors, tie.head: base.tensors[tie.embedding]._replace(name=tie.head)},
        weight_map={**base.weight_map, tie.head: base.weight_map[tie.embedding]},
        stored={**base.stored, tie.head: base.stored.get(tie.embedding, tie.embedding)},
    )


def settle_tie(adapter: Adapter, tie: Tie | None, base: Checkpoint, has_data: bool) -> Adapter:
    """Return the adapter with both tied tensors changed alike, or marked as one that unties them.

    Args:
        adapter: The adapter over the base that `add_head` returns.
        tie: The base's tie; None if it has none.
        base: The base as it is in its files.
        has_data: False if zeros take the place of the adapter's data, so that the config alone must decide.

    Raises:
        CheckpointError: The adapter trains an embedding that is tied to tensors whose names are not known here.
    """
    if tie is None:
        _refuse_unknown_tie(adapter, base)
        return adapter
    changes = {name: adapter.full.get(name) or adapter.low_rank.get(name) for name in (tie.embedding, tie.head)}
    if not any(changes.values()):
        return adapter
    if not _stay_tied(adapter, tie, changes, has_data):
        return replace(adapter, unties=True, note=_note(tie, changes))
    return _tied_again(adapter, tie)


def _stay_tied(adapter: Adapter, tie: Tie, changes: Mapping[str, TensorInfo | LowRank | None], has_data: bool) -> bool:
    """Return True if the embedding and the head are the same matrix in the trained model.

    If PEFT ties the two modules that it trains, it saves both. `ensure_weight_tying` alone does not show a tie: PEFT
    ties only modules with the names embed_tokens and lm_head.
    """
    embedding, head = changes[tie.embedding], changes[tie.head]
    if embedding is not None and head is not None:
        if not has_data:
            return bool(adapter.config.get("ensure_weight_tying")) or not _is_trained_copy(adapter, embedding)
        return type(embedding) is type(head) and are_equal(adapter.shard, embedding, head)
    # An embedding that was resized, or that the user trained as a whole, is no copy, so the head is still tied to it.
    change = embedding if embedding is not None else head
    return not isinstance(change, LowRank) and not _is_trained_copy(adapter, change)


def _is_trained_copy(adapter: Adapter, change: TensorInfo | LowRank | None) -> bool:
    """Return True if a whole tensor belongs to one of `modules_to_save`: PEFT trains copies of these.

    PEFT trains a copy of every module whose name ends with one of these names, in the sense of `str.endswith`.
    """
    if not isinstance(change, TensorInfo):
        return False
    saved = tuple(map(str, adapter.config.get("modules_to_save") or ()))
    return any(name.removesuffix(".weight").endswith(saved) for name in names_without_wrappers(change.name))


def _tied_again(adapter: Adapter, tie: Tie) -> Adapter:
    """Return the adapter with the embedding's change for both tensors, or for the one that the base stores."""
    copies = {name: tensor for name, tensor in adapter.copies.items() if name != tie.head}
    return replace(
        adapter, full=_shared(adapter.full, tie), low_rank=_shared(adapter.low_rank, tie), copies=copies
    )  # fmt: skip


def _shared(changes: Mapping[str, Change], tie: Tie) -> dict[str, Change]:
    """Return the changes with one change for both tied tensors: the embedding's, or the head's if there is no other.

    A head that the base does not store gets no change of its own.
    """
    found = dict(changes)
    head = found.pop(tie.head, None)
    change = found.get(tie.embedding, head)
    if change is not None:
        found |= dict.fromkeys((tie.embedding, tie.head) if tie.stored else (tie.embedding,), change)
    return found


def _note(tie: Tie, changes: Mapping[str, TensorInfo | LowRank | None]) -> str:
    """Return the sentence about an adapter that unties head and embedding."""
    trained = " and ".join(repr(name) for name, change in changes.items() if change is not None)
    lora = any(isinstance(change, LowRank) for change in changes.values())
    peft = (
        "; PEFT's merge_and_unload() would change the tied matrix itself, which is not what was trained" if lora else ""
    )
    return (
        f"sft ties {tie.head!r} to {tie.embedding!r}, and the adapter trains {trained} apart: the output has both "
        f"tensors, and its config.json says tie_word_embeddings false{peft}"
    )


def _refuse_unknown_tie(adapter: Adapter, base: Checkpoint) -> None:
    """Raise CheckpointError if a trained copy of an embedding changes a head whose name is not known here."""
    if tie_flag(base.config) is not True or any(map(HEAD.search, base.tensors)) or not generates(base.config):
        return
    for name in (*adapter.low_rank, *adapter.full):
        apart = name in adapter.low_rank or _is_trained_copy(adapter, adapter.full.get(name))
        if apart and is_embedding(name):
            raise CheckpointError(f"{adapter.path}: the adapter trains {name!r}; {TIED_ELSEWHERE}")
