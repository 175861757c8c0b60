"""Why two checkpoints cannot be merged: each problem says what, where, both values, and what to do about it. Pure.

A message offers `on_unpaired` or `on_mismatch` only where the tensors are likely to be parts that one model has and the
other has not. Where they look like the same tensors in another form, the option would leave them as aligned has them
without a word, so the message says what they look like instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..checkpoints.model_parts import EMPTY_HINT, HEAD, generates, is_embedding, tie_flag
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.naming import find_shared_prefix, mask_numbers, unwrap
from ..checkpoints.quantization import describe_problem
from ..checkpoints.safetensors_header import TensorInfo, describe, element_count
from ..dtypes import INTEGERS, ITEMSIZE
from .pairing import Pairs, mismatched, rows_in_common

SHOWN = 10  # tensors, or groups of them, that one problem lists
# Without the option transformers 5 writes the names and the layout that it has read.
SAVE_AS_IN_MEMORY = "save_pretrained(folder, save_original_format=False)"
_PEFT = re.compile(r"\.(base_layer|lora_(A|B|embedding_A|embedding_B)|lora_magnitude_vector|modules_to_save)\.")
_ONE_EXPERT = re.compile(r"(^|\.)\w*experts?\.\d+\.")
_EXPERTS = re.compile(r"(^|\.)\w*experts?\.")


def model_problems(sft: ModelTensors, aligned: ModelTensors) -> list[str]:
    """Return what is wrong with either checkpoint as a whole, or with the two together."""
    roles = (("sft", sft), ("aligned", aligned))
    own = roles[: 1 if aligned.adapter else 2]
    problems = [text for role, checkpoint in own if (text := describe_problem(role, checkpoint))]
    problems += [text for role, checkpoint in roles if (text := _empty(role, checkpoint, sft, aligned))]
    kinds = [checkpoint.config.get("model_type") for checkpoint in (sft, aligned)]
    if None not in kinds and kinds[0] != kinds[1]:
        problems.append(
            f"different architectures: sft {sft.path} is {kinds[0]!r}, aligned {aligned.path} is {kinds[1]!r}; "
            "extrapolation needs two checkpoints of one model"
        )
    return problems


def _empty(role: str, checkpoint: ModelTensors, sft: ModelTensors, aligned: ModelTensors) -> str | None:
    """Return the problem of a checkpoint whose weights were not gathered; None where there is none."""
    own = checkpoint.adapter.full if checkpoint.adapter else checkpoint.tensors
    names = [name for name in checkpoint.tensors if name in own and is_hollow(name, sft, aligned, checkpoint)]
    if not names:
        return None
    first = checkpoint.tensors[names[0]]
    return (
        f"{role} {checkpoint.path} has {len(names)} empty of {_counted(len(checkpoint.tensors))}, such as {names[0]!r} "
        f"({describe(first)}): {EMPTY_HINT}; gather them and save again (DeepSpeed's zero_to_fp32.py does that from a "
        "checkpoint folder)"
    )


def is_hollow(name: str, sft: ModelTensors, aligned: ModelTensors, checkpoint: ModelTensors) -> bool:
    """Return True if a tensor is empty where a model has numbers: a weight, a bias, or what the other side has."""
    tensor = checkpoint.tensors[name]
    if tensor.dtype not in ITEMSIZE or element_count(tensor.shape):
        return False
    other = (sft if checkpoint is aligned else aligned).tensors.get(name)
    fuller = other is not None and element_count(other.shape) > 0
    return fuller or name.endswith(("weight", "bias")) or _EXPERTS.search(name) is not None


def tensor_problems(
    sft: ModelTensors, aligned: ModelTensors, pairs: Pairs, on_unpaired: str, on_mismatch: str
) -> list[str]:
    """Return what is wrong with single tensors of the two checkpoints, unless the options decide about it."""
    problems = []
    unsupported = [
        f"{role}'s {name} ({tensor.dtype})"
        for role, checkpoint in (("sft", sft), ("aligned", aligned))
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype not in ITEMSIZE and tensor.dtype not in INTEGERS
    ]
    if unsupported:
        what = f"{_counted(len(unsupported))} of a dtype that cannot be extrapolated (quantised?)"
        problems.append(_listing(what, "", unsupported))
    if (pairs.only_in_aligned or pairs.only_in_sft) and on_unpaired == "error":
        problems.append(_unpaired(sft, aligned, pairs))
    if on_mismatch != "aligned":
        problems += _mismatches(sft, aligned, pairs, on_mismatch)
    return problems


def _unpaired(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str:
    """Return the problem of tensors that one checkpoint has alone, with what they look like."""
    alone = [*pairs.only_in_aligned, *pairs.only_in_sft]
    count = f"{_counted(len(alone))} without a counterpart"
    prefix = _unknown_prefix(sft, aligned)
    if prefix is not None and not any(map(_PEFT.search, alone)):
        return f"{count}: {prefix}"
    items = [(name, "aligned only") for name in pairs.only_in_aligned]
    items += [(name, "sft only") for name in pairs.only_in_sft]
    return _listing(count, _likely_cause(sft, aligned, pairs), _grouped(items))


def _unknown_prefix(sft: ModelTensors, aligned: ModelTensors) -> str | None:
    """Return what to say of a side whose names all begin with what the other side's names lack."""
    for role, one, other in (("sft", sft, aligned), ("aligned", aligned, sft)):
        prefix = find_shared_prefix(map(unwrap, one.tensors), map(unwrap, other.tensors))
        if prefix:
            return (
                f"all names of {role} {one.path} begin with {prefix!r}, and without it they are names of the other: "
                "a wrapper added it; save the model inside the wrapper, or take the prefix off the names"
            )
    return None


def _likely_cause(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str:
    """Return what unpaired tensors look like and what to do; the option only where they look like parts of one side."""
    alone = [*pairs.only_in_aligned, *pairs.only_in_sft]
    if any(map(_PEFT.search, alone)):
        return (
            "one of the two is the whole state dict of a PEFT model: merge_and_unload() it with PEFT and "
            "save_pretrained() the result"
        )
    if _differs_by_experts(pairs):
        return (
            "the experts of the one are fused and those of the other are apart: load the one whose experts are apart "
            f"with transformers, and {SAVE_AS_IN_MEMORY}, which fuses them"
        )
    if _same_shapes(sft, aligned, pairs) or _same_layers(pairs):
        return (
            "they look like the same tensors under other names or in another form: if transformers loads both and "
            f"reports no missing weights, {SAVE_AS_IN_MEMORY} gives both the same names; else rename those of one side"
        )
    if _lacks_layers(aligned, pairs):
        return "aligned lacks layers that sft has: is all of it saved, and is it a model of the same depth?"
    return _tie(sft, aligned, pairs) or "`on_unpaired='aligned'` keeps aligned's, drops sft's"


def _differs_by_experts(pairs: Pairs) -> bool:
    """Return True if one side has a tensor for each expert and the other has one for all experts."""
    sides = [[name for name in names if _EXPERTS.search(name)] for names in (pairs.only_in_aligned, pairs.only_in_sft)]
    apart = [any(_ONE_EXPERT.search(name) for name in names) for names in sides]
    return all(sides) and apart[0] is not apart[1]


def _tie(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str | None:
    """Return what to do about a head that one side has alone; None where it is not a matter of ties."""
    for role, lacking, names in (("sft", sft, pairs.only_in_aligned), ("aligned", aligned, pairs.only_in_sft)):
        lost = any(map(HEAD.search, names)) and not any(map(HEAD.search, lacking.tensors))
        if not lost or not generates(lacking.config):
            continue
        if tie_flag(lacking.config) is not True:
            return (
                f"{role} {lacking.path} has no head: if it uses its embedding for that, say so by "
                '"tie_word_embeddings": true in its config.json; else download or save it again'
            )
        return (
            f"{role} ties its head to its embedding and the other has a head of its own: load {role} with "
            "transformers, give its lm_head.weight a copy of its own (torch.nn.Parameter(model.lm_head.weight.detach()"
            ".clone())), set model.config.tie_word_embeddings to False, and save_pretrained() it"
        )
    if all(map(is_embedding, (*pairs.only_in_aligned, *pairs.only_in_sft))):
        role, lacking = ("sft", sft) if pairs.only_in_aligned else ("aligned", aligned)
        return f"{role} {lacking.path} is not whole: it lacks an embedding; download or save it again"
    return None


def _same_shapes(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> bool:
    """Return True if most tensors of the side with fewer unpaired ones have a shape that the other side lacks too."""
    ours = Counter(aligned.tensors[name].shape for name in pairs.only_in_aligned)
    theirs = Counter(sft.tensors[name].shape for name in pairs.only_in_sft)
    return 2 * (ours & theirs).total() > min(ours.total(), theirs.total()) > 0


def _same_layers(pairs: Pairs) -> bool:
    """Return True if most modules with unpaired tensors have some on both sides: q_proj here, and qkv_proj there."""
    ours, theirs = ({name.rsplit(".", 2)[0] for name in names} for names in (pairs.only_in_aligned, pairs.only_in_sft))
    both = [module for module in ours & theirs if re.search(r"\.\d+(\.|$)", module)]
    return 2 * len(both) > min(len(ours), len(theirs)) > 0


def _lacks_layers(aligned: ModelTensors, pairs: Pairs) -> bool:
    """Return True if sft alone has layers that aligned's config counts too.

    DeepSeek and others publish one layer more than config.json counts, to predict further tokens, and transformers
    does not save it.
    """
    inner = aligned.config.get("text_config")
    counts = [each.get("num_hidden_layers") for each in (aligned.config, inner if isinstance(inner, dict) else {})]
    layers = next((count for count in counts if isinstance(count, int)), None)
    known = {mask_numbers(name) for name in aligned.tensors}
    for name in pairs.only_in_sft:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if number and mask_numbers(name) in known and (layers is None or int(number[0]) < layers):
            return True
    return False


def _mismatches(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs, on_mismatch: str) -> list[str]:
    """Return the problems of pairs that differ in shape, or of which one has integers and the other has numbers."""
    others = {name: each.tensor for name, each in pairs.counterparts.items()}
    others = {name: other for name, other in others.items() if mismatched(aligned.tensors[name], other)}
    kinds, shapes = [], {}
    for name, other in others.items():
        tensor = aligned.tensors[name]
        if is_hollow(name, sft, aligned, aligned) or (name in sft.tensors and is_hollow(name, sft, aligned, sft)):
            continue  # model_problems names it
        if (tensor.dtype in ITEMSIZE) != (other.dtype in ITEMSIZE):
            kinds.append(name)
        elif not (on_mismatch == "rows" and rows_in_common(tensor, other)):
            shapes[name] = other
    problems = []
    for names, what, fix in (
        (kinds, "with integers in the one and numbers in the other", "one of the two is quantised, or another model"),
        (list(shapes), "whose counterpart has another shape", _shape_fix(sft, aligned, shapes, on_mismatch)),
    ):
        items = [f"{name}: sft {describe(others[name])}, aligned {describe(aligned.tensors[name])}" for name in names]
        problems += [_listing(f"{_counted(len(items))} {what}", fix, items)] if items else []
    return problems


def _shape_fix(sft: ModelTensors, aligned: ModelTensors, others: Mapping[str, TensorInfo], on_mismatch: str) -> str:
    """Return what to do about pairs of different shapes; an option where it gives a model that was extrapolated."""
    tensors = {name: aligned.tensors[name] for name in others}
    if any(element_count(tensor.shape) == 0 for tensor in (*tensors.values(), *others.values())):
        return "some are empty: save the model again with gathered weights"
    if 2 * float_bytes(tensors.values()) > float_bytes(aligned.tensors.values()):
        return "they are most of the model: sft and aligned look like models of different sizes"
    fix = "`on_mismatch='aligned'` keeps aligned's"
    rows = all(rows_in_common(tensor, others[name]) for name, tensor in tensors.items())
    if rows and any(map(is_embedding, tensors)) and on_mismatch == "error":  # a vocabulary of another size
        fix += ", rows extrapolates the rows that both have"
    return fix


def float_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Return the bytes of the tensors that have floating-point numbers."""
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype in ITEMSIZE)


def _grouped(items: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each (name, side), or for each pattern of names where these would be too many lines."""
    if len(items) <= SHOWN:
        return [f"{name} ({side})" for name, side in items]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, side in items:
        groups.setdefault((mask_numbers(name), side), []).append(name)
    return [
        f"{names[0]} ({side})" if len(names) == 1 else f"{pattern} ({side}): {_counted(len(names))}"
        for (pattern, side), names in groups.items()
    ]


def _counted(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _listing(what: str, fix: str, items: Sequence[str]) -> str:
    """Return what is wrong, what to do, and a line for each of the first items."""
    shown = [*items[:SHOWN], *([f"and {len(items) - SHOWN} more lines like these"] if len(items) > SHOWN else [])]
    return "\n  ".join([f"{what}; {fix}:" if fix else f"{what}:", *shown])
