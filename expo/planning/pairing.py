"""The counterpart in sft of each tensor of aligned: by name, else under an older name, else as a tied weight.

Pure. Nothing is guessed: a counterpart under another name has the same shape (rows of the same width, where it is a
tie), is the only tensor that fits, and its step says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.naming import unwrapped
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import ITEMSIZE

# What old files carry beside the weights: tables and masks that the model computes from its config.
BUFFERS = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)|(cross)?(attn|attention)\.masked_bias"
    r"|embeddings\.position_ids)$"
)
MASK = re.compile(r"(^|\.)(cross)?(attn|attention)\.bias$")  # GPT-2's, GPT-NeoX's: [1, 1, n, n], where a bias has [n]

# What has a row for each token. Neither is part of a numbered layer, where other things have such names.
_OUTER = r"^(?!(.*\.)?\d+\.)"
_WRAPPERS = r"((module|_orig_mod|base_model|model|transformer|language_model)\.)*"
HEAD = re.compile(rf"{_OUTER}((.*\.)?(lm_head|embed_out)|{_WRAPPERS}output)\.weight$")
EMBEDDING = re.compile(
    rf"{_OUTER}((.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|backbone\.embeddings?)"
    rf"|{_WRAPPERS}shared)\.weight$"
)
SHARED = re.compile(rf"{_OUTER}{_WRAPPERS}(shared|(encoder|decoder)\.embed_tokens)\.weight$")  # T5's, BART's

_GENERATES = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForImageTextToText|ForMaskedLM|ForSeq2SeqLM")

# One name in two ways, of versions of transformers: (pattern, replacement).
_RENAMES = (
    (r"^(model|transformer|gpt_neox|bert|roberta|backbone)\.", ""),  # saved without its head
    (r"^embed_out\.", "lm_head."),  # GPT-NeoX, before 5 and since
    (r"^language_model\.model\.", "model.language_model."),  # vision-language models, before 4.52 and since
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.|)vision_tower\.vision_model\.", r"\1vision_tower."),  # CLIP and SigLIP, before 5 and since
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^(vision_tower|vision_model|multi_modal_projector|visual|image_newline|audio_tower)\b", r"model.\1"),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),  # Qwen2-VL, before 4.52 and since
    (r"^model\.language_model\.", "language_model."),
    (r"\.gamma$", ".weight"),  # LayerNorm, as TensorFlow names it
    (r"\.beta$", ".bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),  # weight_norm, before torch 2.0 and since
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
RENAMES = tuple((re.compile(pattern), new) for pattern, new in _RENAMES)


class Counterpart(NamedTuple):
    """The tensor of sft that belongs to a tensor of aligned; reason: why, "" where the names are the same."""

    tensor: TensorInfo
    reason: str


class Pairs(NamedTuple):
    """The pairs of tensors of two models, and what has no counterpart.

    Attributes:
        counterparts: By aligned's name for the tensor.
        kept: The tensors of aligned that need no counterpart, and the reason.
        dropped: The tensors of sft that need none, and the reason.
        only_in_aligned: The names of aligned's other tensors.
        only_in_sft: The names of sft's other tensors.
    """

    counterparts: dict[str, Counterpart]
    kept: dict[str, str]
    dropped: dict[str, str]
    only_in_aligned: list[str]
    only_in_sft: list[str]


def pair(sft: ModelTensors, aligned: ModelTensors) -> Pairs:
    """Return the counterpart of each of aligned's tensors: by name, else under an older name, else as a tied weight."""
    ours, theirs = aligned.tensors, sft.tensors
    kept = {name: "a buffer, which the model computes, and no weight" for name, tensor in ours.items()
            if is_buffer(tensor) and is_buffer(theirs.get(name, tensor))}  # fmt: skip
    dropped = {name: "a buffer, which the model computes" for name, tensor in theirs.items()
               if is_buffer(tensor) and name not in ours}  # fmt: skip
    counterparts = {name: Counterpart(theirs[name], "") for name in ours if name in theirs and name not in kept}
    only_ours = {name: tensor for name, tensor in ours.items() if name not in counterparts and name not in kept}
    only_theirs = {name: tensor for name, tensor in theirs.items() if name not in ours and name not in dropped}
    for name, other in _renamed(only_ours, only_theirs).items():
        counterparts[name] = Counterpart(only_theirs.pop(other), f"sft calls it {other}")
        del only_ours[name]
    flags = tie_flag(sft.config), tie_flag(aligned.config)
    tied = _tied(only_ours, theirs, flags[0] is not False and flags != (None, False))
    counterparts |= {name: Counterpart(theirs[other], f"sft ties it to {other}") for name, other in tied.items()}
    read = set(tied.values())
    only_theirs = {name: tensor for name, tensor in only_theirs.items() if name not in read}
    ties = _tied(only_theirs, ours, False not in flags)
    dropped |= {name: f"aligned ties it to {other}" for name, other in ties.items()}
    unpaired = [name for name in only_ours if name not in tied], [name for name in only_theirs if name not in ties]
    return Pairs(counterparts, kept, dropped, *unpaired)


def is_buffer(tensor: TensorInfo) -> bool:
    """Return True for a table or mask that the model computes from its config, and that is no weight."""
    if MASK.search(tensor.name):
        return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return BUFFERS.search(tensor.name) is not None


def _renamed(here: Mapping[str, TensorInfo], there: Mapping[str, TensorInfo]) -> dict[str, str]:
    """From names of one side to names of the other that mean the same; both sides' names are alone so far."""
    if not here or not there:
        return {}
    index = NameIndex(there)
    found: dict[str, str] = {}
    for name, tensor in here.items():
        fits = {old for old in index.find(name) if there[old].shape == tensor.shape}
        if len(fits) == 1:
            found[name] = fits.pop()
    taken = Counter(found.values())
    return {name: old for name, old in found.items() if taken[old] == 1}


class NameIndex:
    """Finds a tensor among others under a name of another version of transformers, or of a wrapper around the model."""

    def __init__(self, names: Iterable[str]) -> None:
        self._unwrapped: dict[str, set[str]] = {}
        self._renamed: dict[str, set[str]] = {}
        for name in names:
            self._unwrapped.setdefault(unwrapped(name), set()).add(name)
            for form in _forms(name):
                self._renamed.setdefault(form, set()).add(name)

    def find(self, name: str) -> set[str]:
        """Return the names among the others that may mean the same tensor: one rename apart, in either direction."""
        found = set(self._renamed.get(unwrapped(name), ()))
        for form in _forms(name):
            found |= self._unwrapped.get(form, set())
        return found


def _forms(name: str) -> set[str]:
    """Return the names that a tensor may have instead: without a wrapper's prefixes, and with at most one rename."""
    short = unwrapped(name)
    return {short, *(pattern.sub(new, short) for pattern, new in RENAMES)}


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """What a config says of tied embeddings; None where it says nothing, which means that files decide."""
    inner = config.get("text_config")
    said = [each.get("tie_word_embeddings") for each in (config, inner if isinstance(inner, dict) else {})]
    return False if False in said else True if True in said else None


def generates(config: Mapping[str, Any]) -> bool:
    """Return False if a config says that the model has no head for tokens: a classifier, or a model without a head."""
    architectures = config.get("architectures") or []
    return not architectures or any(_GENERATES.search(str(each)) for each in architectures)


def _tied(alone: Mapping[str, TensorInfo], lacking: Mapping[str, TensorInfo], tied: bool) -> dict[str, str]:
    """From the names that one side has alone to the tensor that the other uses in their place, where there is one.

    A head that is missing is the embedding, or the embedding the head, where the two are tied; an encoder and a decoder
    share their embedding.
    """
    heads, embeddings, shared = ([name for name in lacking if kind.search(name)] for kind in (HEAD, EMBEDDING, SHARED))
    found: dict[str, str] = {}
    for name, tensor in alone.items():
        if HEAD.search(name) and not heads and tied:
            fits = [other for other in shared if other.endswith("shared.weight")] or embeddings
        elif EMBEDDING.search(name) and not embeddings and tied:
            fits = heads
        elif SHARED.search(name):
            fits = [other for other in shared if other.endswith("shared.weight")] or shared
        else:
            continue
        if len(fits) == 1 and lacking[fits[0]].shape[1:] == tensor.shape[1:]:
            found[name] = fits[0]
    return found


def mismatched(aligned: TensorInfo, sft: TensorInfo) -> bool:
    """Return True if a pair cannot be extrapolated as it is: by shape, or as one of the two has no numbers."""
    return aligned.shape != sft.shape or (aligned.dtype in ITEMSIZE) != (sft.dtype in ITEMSIZE)


def rows_in_common(aligned: TensorInfo, sft: TensorInfo) -> int:
    """Return how many first rows could be extrapolated where only the numbers of rows differ; 0 for none."""
    floating = aligned.dtype in ITEMSIZE and sft.dtype in ITEMSIZE
    if not floating or not aligned.shape or not sft.shape or aligned.shape[1:] != sft.shape[1:]:
        return 0
    return min(aligned.shape[0], sft.shape[0])


def describe(tensor: TensorInfo) -> str:
    """Return a tensor's dtype and shape: `BF16 [4096, 32]`."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row for each token: an embedding or a head."""
    return bool(HEAD.search(name) or EMBEDDING.search(name))
