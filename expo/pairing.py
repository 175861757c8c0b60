"""Which tensor of sft is the twin of which of aligned: by name, else as a tied weight, else under an older name.

Pure. Nothing is guessed: a twin under another name has the same shape, is the only one that fits, and its step says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .checkpoint import Checkpoint
from .header import TensorInfo

# What old files carry beside the weights: tables and masks that the model computes from its config.
BUFFERS = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)|(attn|attention)\.masked_bias|embeddings\.position_ids)$"
)
MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT-2's and GPT-NeoX's: [1, 1, n, n], where a bias has [n]
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight",
    "shared.weight",
)  # fmt: skip

# One name in two ways: (pattern, replacement), of versions of transformers and of what wraps a model when it is saved.
RENAMES = (
    (r"^(module|_orig_mod)\.", ""),
    (r"\._orig_mod\.", "."),
    (r"^base_model\.model\.", ""),
    (r"^(model|transformer|gpt_neox|bert|roberta|backbone)\.", ""),  # saved without its head
    (r"^language_model\.model\.", "model.language_model."),  # vision-language models, before 4.52 and since
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|vision_model|multi_modal_projector|visual|image_newline|audio_tower)\b", r"model.\1"),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),  # Qwen2-VL, before 4.52 and since
    (r"^model\.language_model\.", "language_model."),
    (r"\.gamma$", ".weight"),  # LayerNorm, as TensorFlow names it
    (r"\.beta$", ".bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),  # weight_norm, before torch 2.0 and since
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


class Twin(NamedTuple):
    """A tensor of sft; reason: why it is the twin, "" where the names are the same."""

    tensor: TensorInfo
    reason: str


class Pairs(NamedTuple):
    """twins: by aligned's name. kept, dropped: what needs no twin, of aligned and of sft, and the reason.

    unpaired: names of aligned alone. left: names of sft alone.
    """

    twins: dict[str, Twin]
    kept: dict[str, str]
    dropped: dict[str, str]
    unpaired: list[str]
    left: list[str]


def pair(sft: Checkpoint, aligned: Checkpoint) -> Pairs:
    """The fate of every name of both checkpoints."""
    kept = dict.fromkeys(_buffers(aligned.tensors), "a buffer, which the model computes, and no weight")
    dropped = {name: "a buffer, which the model computes" for name in _buffers(sft.tensors) if name not in kept}
    twins = {name: Twin(sft.tensors[name], "") for name in aligned.tensors if name in sft.tensors and name not in kept}
    here = {name: t for name, t in aligned.tensors.items() if name not in twins and name not in kept}
    there = {name: t for name, t in sft.tensors.items() if name not in twins and name not in {*kept, *dropped}}
    found = _renamed(here, there)
    twins |= {name: Twin(there.pop(old), f"sft calls it {old}") for name, old in found.items()}
    for name in here:
        tied = None if name in found else stands_for(here[name], sft)
        if tied is not None:
            twins[name] = Twin(sft.tensors[tied], f"sft ties it to {tied}")
    for name in list(there):
        tied = stands_for(there[name], aligned)
        if tied is not None:
            dropped[name] = f"aligned ties it to {tied}"
            del there[name]
    return Pairs(twins, kept, dropped, [name for name in here if name not in twins], list(there))


def _buffers(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if BUFFERS.search(name) or (MASK.search(name) and len(tensor.shape) == 4):
            yield name


def _renamed(here: Mapping[str, TensorInfo], there: Mapping[str, TensorInfo]) -> dict[str, str]:
    """From names of one side to names of the other that mean the same; both sides' names are alone so far."""
    if not here or not there:
        return {}
    back: dict[str, set[str]] = {}
    for old in there:
        for form in _forms(old):
            back.setdefault(form, set()).add(old)
    found: dict[str, str] = {}
    for name, tensor in here.items():
        fits = {old for old in _forms(name) | back.get(name, set()) if old in there}
        fits = {old for old in fits if there[old].shape == tensor.shape}
        if len(fits) == 1:
            found[name] = fits.pop()
    taken = Counter(found.values())
    return {name: old for name, old in found.items() if taken[old] == 1}


def _forms(name: str) -> set[str]:
    """What one rename makes of a name."""
    return {re.sub(pattern, new, name) for pattern, new in RENAMES}


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """What a config says of tied embeddings; None where it says nothing, which means that files decide."""
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(each.get("tie_word_embeddings"), bool):
            return bool(each["tie_word_embeddings"])
    return None


def stands_for(tensor: TensorInfo, lacking: Checkpoint) -> str | None:
    """The tensor that a checkpoint without this one uses in its place: its embedding for a head, say; None for none.

    A head that is missing is tied unless the config says otherwise; an encoder and a decoder share their embedding.
    """
    head = _ends(tensor.name, HEADS)
    if not head and not _ends(tensor.name, EMBEDDINGS):
        return None
    heads = [other for other in lacking.tensors if _ends(other, HEADS)]
    embeddings = [other for other in lacking.tensors if _ends(other, EMBEDDINGS)]
    shared = [other for other in embeddings if _ends(other, EMBEDDINGS[-1:])] or embeddings
    if (head or not embeddings) and tie_flag(lacking.config) is False:
        return None
    fits = ([] if heads else shared) if head else (shared or heads)
    same = [other for other in fits if lacking.tensors[other].shape[1:] == tensor.shape[1:]]
    return same[0] if len(fits) == len(same) == 1 else None


def _ends(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name is one of these, in whatever module."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row for each token: an embedding or a head."""
    return _ends(name, (*HEADS, *EMBEDDINGS))
