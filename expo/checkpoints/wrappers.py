"""A checkpoint whose tensors have the names of a wrapper around the model, and the model's own names for them.

transformers finds none of a wrapper's names: it leaves the weights of such a checkpoint at random values. So an output
never has these names. This module reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .checkpoint import Checkpoint
from .naming import INNER_WRAPPER, OUTER_WRAPPER, find_common_prefix

# PEFT puts `base_model.model.` before the names of a model without its head, and `base_model.` before names that begin
# with `model.`; this expression finds both.
_BODY = re.compile(r"(^|\.)base_model\.model\.\w+\.\d+\.")
# A trainer's own module may have the model as `self.model`; after that, the model's names begin with one of these.
_BEGINNINGS = ("model", "transformer", "gpt_neox", "bert", "roberta", "rwkv", "language_model", "lm_head", "embed_out")
# No model has one of these in a module of its own that is called `model`.
_NEVER_INSIDE = ("transformer", "gpt_neox", "bert", "roberta", "rwkv", "lm_head", "embed_out")


def remove_wrapper(aligned: Checkpoint, sft: Checkpoint) -> Checkpoint:
    """Return aligned with the names that its model has, so that the output loads.

    Args:
        aligned: The checkpoint whose names the output takes.
        sft: The checkpoint that may show the names without the wrapper. It may be aligned itself.

    Returns:
        aligned itself if no wrapper is found, or if two of the shorter names would be the same.
    """
    shorter = _model_names(aligned, sft)
    if all(name == new for name, new in shorter.items()) or len(set(shorter.values())) < len(shorter):
        note = _warn_of_prefix(aligned.tensors)
        return replace(aligned, notes=(*aligned.notes, note)) if note else aligned
    return replace(
        aligned,
        tensors={shorter[name]: tensor._replace(name=shorter[name]) for name, tensor in aligned.tensors.items()},
        weight_map={shorter[name]: shard for name, shard in aligned.weight_map.items()},
        stored={new: name for name, new in shorter.items() if new != name},
        dequantized=frozenset(shorter[name] for name in aligned.dequantized),
        notes=(*aligned.notes, _note(shorter)),
    )


def _note(shorter: Mapping[str, str]) -> str:
    """Return the sentence about a wrapper's names in aligned."""
    longer = [name for name, new in shorter.items() if new != name]
    more = f", and so on for {len(longer)} names" if len(longer) > 1 else ""
    return (
        f"aligned was saved inside a wrapper, whose names no model has: its {longer[0]!r} is {shorter[longer[0]]!r} in "
        f"the output{more}"
    )


def _warn_of_prefix(names: Iterable[str]) -> str | None:
    """Return a warning if all names begin with a prefix that may be a wrapper's, and sft's names do not show it."""
    names = list(names)
    prefix = find_common_prefix(names)
    parts = prefix.split(".")[:-1]
    follow = {name.removeprefix(prefix).partition(".")[0] for name in names}
    is_unknown = bool(set(parts) - set(_BEGINNINGS) and follow & set(_BEGINNINGS))
    if not (OUTER_WRAPPER.search(prefix) or is_unknown or len(set(parts)) < len(parts)):
        return None
    return (
        f"all names of aligned begin with {prefix!r}, and so do the output's: if a wrapper around the model added "
        "that, no model finds these tensors, and `check` shows it; remove the prefix from the names then"
    )


def _model_names(aligned: Checkpoint, sft: Checkpoint) -> dict[str, str]:
    """Return the model's own name for each name of aligned."""
    theirs = {INNER_WRAPPER.sub("", name) for name in sft.tensors}
    names = {name: INNER_WRAPPER.sub("", name) for name in aligned.tensors}
    outer = {name: OUTER_WRAPPER.sub("", inner) for name, inner in names.items()}
    if any(map(_BODY.search, names.values())) and not _has_names(outer, names, theirs):
        outer = {name: f"model.{short}" if short != names[name] else short for name, short in outer.items()}
    if _has_names(outer, names, theirs) or (_is_transformers_own(aligned) and _all_differ(outer, names)):
        names = outer
    return _without_trainers_module(names, theirs, _is_transformers_own(aligned))


def _without_trainers_module(names: dict[str, str], theirs: set[str], is_transformers_own: bool) -> dict[str, str]:
    """Return the names without the `model.` of a trainer's module, if all begin with it and the model's own follow.

    `model.layers.0` beside sft's `layers.0` is no wrapper: sft was saved without its head.
    """
    if any(not inner.startswith("model.") for inner in names.values()):
        return names
    inner_names = {name: inner.removeprefix("model.") for name, inner in names.items()}
    beginnings = {inner.partition(".")[0] for inner in inner_names.values()}
    is_whole = not any(re.match(r"\w+\.\d+\.", inner) for inner in inner_names.values())
    if is_whole and _has_names(inner_names, names, theirs):
        return inner_names
    return inner_names if is_transformers_own and beginnings & set(_NEVER_INSIDE) else names


def _has_names(shorter: Mapping[str, str], names: Mapping[str, str], theirs: set[str]) -> bool:
    """Return True if sft has the short form and not the long one, for most of the names that get shorter.

    Args:
        shorter: The short form of each name of aligned, which may be the long one.
        names: The long form of each name of aligned.
        theirs: The names of sft.
    """
    changed = [name for name in names if shorter[name] != names[name]]
    fitting = sum(shorter[name] in theirs and names[name] not in theirs for name in changed)
    return 2 * fitting > len(changed)


def _all_differ(shorter: Mapping[str, str], names: Mapping[str, str]) -> bool:
    """Return True if every name gets shorter."""
    return all(shorter[name] != names[name] for name in names)


def _is_transformers_own(checkpoint: Checkpoint) -> bool:
    """Return True if transformers' own code reads the checkpoint: none of its models has a wrapper's names."""
    return bool(checkpoint.config.get("model_type")) and not checkpoint.config.get("auto_map")
