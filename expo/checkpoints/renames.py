"""The names that one tensor has in different files of the same model: the one table of renames, and a search by it.

Versions of transformers write a model's tensors under different names, and a model that was saved without its head
lacks a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .naming import unwrap

# Two beginnings of one tensor's name. An adapter's names are looked up by them in this order, and the first that the
# base has counts. A comment gives the versions of transformers that write the first and the second beginning.
PREFIXES = (
    ("model.", ""),  # saved with its head and without it
    ("transformer.", ""),
    ("gpt_neox.", ""),
    ("model.language_model.", "language_model.model."),  # vision-language models: from 4.52 on; before 4.52
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "model."),  # Qwen2-VL: from 4.52 on; before 4.52
    ("model.visual.", "visual."),
    ("language_model.model.", "model."),  # vision-language models before 4.52; the language model alone
)
# Further renames, each with an expression for one name and the replacement that gives the other. A rename counts
# only if it leads to one tensor alone.
PATTERNS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(bert|roberta|backbone)\.", ""),
        (r"^embed_out\.", "lm_head."),  # GPT-NeoX: before transformers 5; from 5 on
        (r"^model\.language_model\.", "language_model."),
        (r"^(model\.|)vision_tower\.vision_model\.", r"\1vision_tower."),  # CLIP, SigLIP: before 5; from 5 on
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(vision_tower|vision_model|multi_modal_projector|image_newline|audio_tower)\b", r"model.\1"),
        (r"\.gamma$", ".weight"),  # LayerNorm, as TensorFlow names it
        (r"\.beta$", ".bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),  # weight_norm: before torch 2.0; from 2.0 on
        (r"\.weight_v$", ".parametrizations.weight.original1"),
    )
)


def names_with_other_prefixes(name: str) -> Iterator[str]:
    """Yield the name with each other beginning that PREFIXES has for it, in the order of the table."""
    for pair in PREFIXES:
        for old, new in (pair, pair[::-1]):
            if name.startswith(old):
                yield new + name[len(old) :]


class NameIndex:
    """An index of names that finds a tensor under a name of another version, or of a wrapper around the model."""

    def __init__(self, names: Iterable[str]) -> None:
        self._unwrapped: dict[str, set[str]] = {}
        self._renamed: dict[str, set[str]] = {}
        for name in names:
            self._unwrapped.setdefault(unwrap(name), set()).add(name)
            for form in _forms(name):
                self._renamed.setdefault(form, set()).add(name)

    def find(self, name: str) -> set[str]:
        """Return the indexed names that may mean the same tensor: one rename away, in either direction."""
        found = set(self._renamed.get(unwrap(name), ()))
        for form in _forms(name):
            found |= self._unwrapped.get(form, set())
        return found


def _forms(name: str) -> set[str]:
    """Return the names that a tensor may have instead: without a wrapper's prefixes, and with at most one rename."""
    short = unwrap(name)
    prefixed = (new + short[len(old) :] for old, new in PREFIXES if short.startswith(old))
    return {short, *prefixed, *(pattern.sub(replacement, short) for pattern, replacement in PATTERNS)}
