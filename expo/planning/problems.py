"""Find the reasons why two models cannot be merged, as messages with the tensors, both values and a way out.

A message offers `on_unpaired` or `on_mismatch` only if the tensors are likely to be parts that one model has and the
other has not. If they look like the same tensors in another form, the option would silently copy them from aligned, so
the message names the form instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from ..checkpoints.adapter import find_whole
from ..checkpoints.model_parts import EMPTY_HINT, HEAD, generates, is_embedding, language_model_type, tie_flag
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.naming import find_wrapper_prefix, mask_numbers, unwrap
from ..checkpoints.quantization import describe_problem
from ..checkpoints.safetensors_header import TensorInfo, describe, element_count
from ..dtypes import INTEGERS, ITEMSIZE, TABLE
from .pairing import Pairs, mismatched, rows_in_common

SHOWN = 10  # tensors, or groups of tensors, that one message lists
# Without the option, transformers 5 saves a model with the names and the layout of the files that it has loaded.
SAVE_AS_IN_MEMORY = "save_pretrained(folder, save_original_format=False)"
_PEFT = re.compile(r"\.(base_layer|lora_(A|B|embedding_A|embedding_B)|lora_magnitude_vector|modules_to_save)\.")
_ONE_EXPERT = re.compile(r"(^|\.)\w*experts?\.\d+\.")
_EXPERTS = re.compile(r"(^|\.)\w*experts?\.")


def model_problems(sft: ModelTensors, aligned: ModelTensors) -> list[str]:
    """Return the problems of either model as a whole, and of the two together."""
    roles = (("sft", sft), ("aligned", aligned))
    checked = roles[: 1 if aligned.adapters else 2]  # an adapter has sft's config
    problems = [text for role, checkpoint in checked if (text := describe_problem(role, checkpoint))]
    problems += [text for role, checkpoint in roles if (text := _empty_problem(role, checkpoint, sft, aligned))]
    types = [checkpoint.config.get("model_type") for checkpoint in (sft, aligned)]
    language = [language_model_type(checkpoint.config) for checkpoint in (sft, aligned)]
    is_one_family = language[0] == language[1] is not None  # a text model and its vision-language model
    if None not in types and types[0] != types[1] and not is_one_family:
        problems.append(
            f"different architectures: sft {sft.path} is {types[0]!r}, aligned {aligned.path} is {types[1]!r}; "
            "extrapolation needs two checkpoints of one model"
        )
    return problems


def _empty_problem(role: str, checkpoint: ModelTensors, sft: ModelTensors, aligned: ModelTensors) -> str | None:
    """Return the problem of a model with empty weights, which were not gathered before saving; None without one."""
    is_stored = partial(find_whole, checkpoint.adapters) if checkpoint.adapters else checkpoint.tensors.get
    names = [name for name in checkpoint.tensors if is_stored(name) and _lacks_elements(name, sft, aligned, checkpoint)]
    if not names:
        return None
    first = checkpoint.tensors[names[0]]
    return (
        f"{role} {checkpoint.path} has {len(names)} empty tensors out of {len(checkpoint.tensors)}, such as "
        f"{names[0]!r} ({describe(first)}): {EMPTY_HINT}; gather the weights and save again (DeepSpeed's "
        "zero_to_fp32.py does that from a checkpoint folder)"
    )


def _lacks_elements(name: str, sft: ModelTensors, aligned: ModelTensors, checkpoint: ModelTensors) -> bool:
    """Return True if a tensor is empty although it should have elements.

    A weight, a bias and an expert's tensor should have elements, and so should a tensor that is not empty in the
    other model.

    Args:
        name: The tensor's name in `checkpoint`.
        sft: The model that aligned was trained from.
        aligned: The aligned model.
        checkpoint: One of the two, which has the tensor.
    """
    tensor = checkpoint.tensors[name]
    if tensor.dtype not in ITEMSIZE or element_count(tensor.shape):
        return False
    other = (sft if checkpoint is aligned else aligned).tensors.get(name)
    other_has_elements = other is not None and element_count(other.shape) > 0
    return other_has_elements or name.endswith(("weight", "bias")) or _EXPERTS.search(name) is not None


def tensor_problems(
    sft: ModelTensors, aligned: ModelTensors, pairs: Pairs, on_unpaired: str, on_mismatch: str
) -> list[str]:
    """Return the problems of single tensors that the options do not settle.

    Args:
        sft: The model that aligned was trained from.
        aligned: The aligned model.
        pairs: The pairs of their tensors.
        on_unpaired: "error" or "aligned", as in `MergeOptions`.
        on_mismatch: "error", "rows" or "aligned", as in `MergeOptions`.
    """
    problems = pairs.problems[:SHOWN]
    if len(pairs.problems) > SHOWN:
        problems.append(f"and {len(pairs.problems) - SHOWN} more messages like these")
    unsupported = [
        f"{role}'s {name} ({tensor.dtype})"
        for role, checkpoint in (("sft", sft), ("aligned", aligned))
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype not in ITEMSIZE and tensor.dtype not in INTEGERS and not _is_copied_buffer(name, tensor, pairs)
    ]
    if unsupported:
        title = f"{_counted(len(unsupported))} of a dtype that cannot be extrapolated (is the checkpoint quantised?)"
        problems.append(_listing(title, "", unsupported))
    if (pairs.only_in_aligned or pairs.only_in_sft) and on_unpaired == "error":
        problems.append(_unpaired_problem(sft, aligned, pairs))
    if on_mismatch != "aligned":
        problems += _mismatch_problems(sft, aligned, pairs, on_mismatch)
    return problems


def _is_copied_buffer(name: str, tensor: TensorInfo, pairs: Pairs) -> bool:
    """Return True for a buffer, which is copied or dropped, of a dtype that a stream can hand out as a tensor."""
    return (name in pairs.kept or name in pairs.dropped) and TABLE[tensor.dtype].torch != ""


def _unpaired_problem(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str:
    """Return the problem of the unpaired tensors, with their likely cause."""
    unpaired = [*pairs.only_in_aligned, *pairs.only_in_sft]
    title = f"{_counted(len(unpaired))} without a counterpart"
    prefix = _unknown_prefix(sft, aligned)
    if prefix is not None and not any(map(_PEFT.search, unpaired)):
        return f"{title}: {prefix}"
    items = [(name, "aligned only") for name in pairs.only_in_aligned]
    items += [(name, "sft only") for name in pairs.only_in_sft]
    return _listing(title, _likely_cause(sft, aligned, pairs), _grouped(items))


def _unknown_prefix(sft: ModelTensors, aligned: ModelTensors) -> str | None:
    """Return the cause and the fix if all names of one model have a prefix that the other model's lack; else None."""
    for role, model, other_role, other in (("sft", sft, "aligned", aligned), ("aligned", aligned, "sft", sft)):
        prefix = find_wrapper_prefix(map(unwrap, model.tensors), map(unwrap, other.tensors))
        if prefix:
            return (
                f"all names of {role} {model.path} begin with {prefix!r}, and without it they are names of "
                f"{other_role}: a wrapper added the prefix; save the model inside the wrapper, or remove the prefix "
                "from the names"
            )
    return None


def _likely_cause(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str:
    """Return the likely cause of the unpaired tensors and its fix.

    The fix is the option `on_unpaired` only if no other cause fits: then the tensors are parts that one model has and
    the other has not.
    """
    if any(map(_PEFT.search, [*pairs.only_in_aligned, *pairs.only_in_sft])):
        return (
            "one of the two checkpoints is the whole state dict of a PEFT model: call merge_and_unload() on that "
            "model, and save_pretrained() on the result"
        )
    if _differs_by_experts(pairs):
        return (
            "one checkpoint has its experts fused and the other has a tensor for each expert: load the other with "
            f"transformers, and save it by {SAVE_AS_IN_MEMORY}, which fuses the experts"
        )
    if _same_shapes(sft, aligned, pairs) or _same_modules(pairs) or _same_size(sft, aligned, pairs):
        return (
            "they look like the same tensors under other names or in another form: if transformers loads both and "
            f"reports no missing weights, {SAVE_AS_IN_MEMORY} gives both the same names; else rename the tensors of one"
        )
    if _lacks_layers(aligned, pairs):
        return "aligned lacks layers that sft has: check that aligned is saved completely and is as deep as sft"
    return _tie_fix(sft, aligned, pairs) or "`on_unpaired='aligned'` keeps aligned's tensors and drops sft's"


def _differs_by_experts(pairs: Pairs) -> bool:
    """Return True if one model has a tensor for each expert and the other has one tensor for all experts."""
    names = [[name for name in side if _EXPERTS.search(name)] for side in (pairs.only_in_aligned, pairs.only_in_sft)]
    apart = [any(_ONE_EXPERT.search(name) for name in side) for side in names]
    return all(names) and apart[0] is not apart[1]


def _tie_fix(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> str | None:
    """Return the cause and the fix if one model lacks its head or its embedding; None for any other cause."""
    for role, lacking, other, names in (
        ("sft", sft, "aligned", pairs.only_in_aligned),
        ("aligned", aligned, "sft", pairs.only_in_sft),
    ):
        lacks_head = any(map(HEAD.search, names)) and not any(map(HEAD.search, lacking.tensors))
        if not lacks_head or not generates(lacking.config):
            continue
        if tie_flag(lacking.config) is not True:
            return (
                f"{role} {lacking.path} has no head: if the model uses its embedding as its head, write "
                '"tie_word_embeddings": true into its config.json; else download or save the checkpoint again'
            )
        return (
            f"{role} ties its head to its embedding and {other} has a head of its own: load {role} with transformers, "
            "set model.lm_head.weight to a copy (torch.nn.Parameter(model.lm_head.weight.detach().clone())) and "
            "model.config.tie_word_embeddings to False, and save the model with save_pretrained()"
        )
    if all(map(is_embedding, (*pairs.only_in_aligned, *pairs.only_in_sft))):
        role, lacking = ("sft", sft) if pairs.only_in_aligned else ("aligned", aligned)
        return f"{role} {lacking.path} lacks an embedding: download or save the checkpoint again"
    return None


def _same_shapes(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> bool:
    """Return True if most unpaired tensors of one model have the shapes of unpaired tensors of the other.

    Most means more than half of the unpaired tensors of the model that has fewer of them.
    """
    of_aligned = Counter(aligned.tensors[name].shape for name in pairs.only_in_aligned)
    of_sft = Counter(sft.tensors[name].shape for name in pairs.only_in_sft)
    return 2 * (of_aligned & of_sft).total() > min(of_aligned.total(), of_sft.total()) > 0


def _same_size(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs) -> bool:
    """Return True if the unpaired tensors of both models have as many elements together, as fused tensors have."""
    counts = [
        sum(element_count(model.tensors[name].shape) for name in names)
        for model, names in ((aligned, pairs.only_in_aligned), (sft, pairs.only_in_sft))
    ]
    return counts[0] == counts[1] > 0


def _same_modules(pairs: Pairs) -> bool:
    """Return True if the unpaired tensors of both models lie in mostly the same modules of numbered layers.

    For example, q_proj in sft and qkv_proj in aligned both lie in the module model.layers.0.self_attn.
    """
    names = pairs.only_in_aligned, pairs.only_in_sft
    of_aligned, of_sft = ({name.rsplit(".", 2)[0] for name in side} for side in names)
    both = [module for module in of_aligned & of_sft if re.search(r"\.\d+(\.|$)", module)]
    return 2 * len(both) > min(len(of_aligned), len(of_sft)) > 0


def _lacks_layers(aligned: ModelTensors, pairs: Pairs) -> bool:
    """Return True if aligned lacks layers that sft has and that the number of layers in aligned's config includes.

    A layer that the config does not count may be missing: DeepSeek and others publish one more layer, which predicts
    further tokens, and transformers does not save it.
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


def _mismatch_problems(sft: ModelTensors, aligned: ModelTensors, pairs: Pairs, on_mismatch: str) -> list[str]:
    """Return the problems of pairs that differ in shape, or in which only one tensor has floating-point numbers."""
    others = {name: counterpart.tensor for name, counterpart in pairs.counterparts.items()}
    others = {name: other for name, other in others.items() if mismatched(aligned.tensors[name], other)}
    integers, shapes = [], {}  # pairs of integers and floating-point numbers; pairs of two shapes
    for name, other in others.items():
        tensor = aligned.tensors[name]
        if _lacks_elements(name, sft, aligned, aligned) or (
            name in sft.tensors and _lacks_elements(name, sft, aligned, sft)
        ):
            continue  # model_problems reports empty tensors
        if (tensor.dtype in ITEMSIZE) != (other.dtype in ITEMSIZE):
            integers.append(name)
        elif not (on_mismatch == "rows" and rows_in_common(tensor, other)):
            shapes[name] = other
    problems = []
    for names, difference, fix in (
        (
            integers,
            "with integers in one checkpoint and floating-point numbers in the other",
            "one of the two is quantised, or they are different models",
        ),
        (list(shapes), "whose counterpart has another shape", _shape_fix(sft, aligned, shapes, on_mismatch)),
    ):
        items = [f"{name}: sft {describe(others[name])}, aligned {describe(aligned.tensors[name])}" for name in names]
        problems += [_listing(f"{_counted(len(items))} {difference}", fix, items)] if items else []
    return problems


def _shape_fix(sft: ModelTensors, aligned: ModelTensors, others: Mapping[str, TensorInfo], on_mismatch: str) -> str:
    """Return the fix for pairs of different shapes.

    The fix is an option only if most of the model would be extrapolated with that option.
    """
    tensors = {name: aligned.tensors[name] for name in others}
    if any(element_count(tensor.shape) == 0 for tensor in (*tensors.values(), *others.values())):
        return "some are empty: save the model again with gathered weights"
    if 2 * float_bytes(tensors.values()) > float_bytes(aligned.tensors.values()):
        return "they are most of the model: sft and aligned look like models of different sizes"
    fix = "`on_mismatch='aligned'` keeps aligned's tensors"
    rows = all(rows_in_common(tensor, others[name]) for name, tensor in tensors.items())
    if rows and any(map(is_embedding, tensors)) and on_mismatch == "error":  # a vocabulary of another size
        fix += ", `on_mismatch='rows'` extrapolates the rows that both have"
    return fix


def float_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Return the number of bytes of the tensors whose dtype can be extrapolated."""
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype in ITEMSIZE)


def _grouped(items: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each (name, side), or for each pattern of names if there are more than SHOWN names."""
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
    """Return `1 tensor` or `2 tensors`."""
    return f"{count} tensor{'s' * (count != 1)}"


def _listing(title: str, fix: str, items: Sequence[str]) -> str:
    """Return a message: a line with the title and the fix, and a line for each of the first items."""
    shown = [*items[:SHOWN], *([f"and {len(items) - SHOWN} more lines like these"] if len(items) > SHOWN else [])]
    return "\n  ".join([f"{title}; {fix}:" if fix else f"{title}:", *shown])
