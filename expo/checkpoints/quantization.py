"""Quantised checkpoints: how one is recognised, which scheme it has, and what the user can do.

A quantised weight has codes, which are small integers, in place of its numbers. Companions of the weight, such as
scales, decode the codes. config.json, a file of the scheme's own, or the names of the tensors show the scheme. If all
of them are unknown here, the tensors still show codes: a weight of integers, or integers beside a scale. This module
reads no file. `quantized_tensors.py` finds the tensors whose values can be computed, which are not refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..dtypes import INTEGERS, ITEMSIZE
from .files import QUANTIZATION_FILES
from .model_parts import is_buffer
from .model_tensors import ModelTensors
from .naming import mask_numbers
from .quantized_tensors import SHOWN, QuantizedTensors, find_quantized
from .safetensors_header import TensorInfo

ORIGINAL = "use the checkpoint that it was quantised from"
LOADED = "load it with transformers, quantization_config={0}(dequantize=True), and save it with save_pretrained()"
WAYS_OUT = {
    "fp8": f"{ORIGINAL}, or {LOADED.format('FineGrainedFP8Config')}",
    "mxfp4": f"{ORIGINAL}, or {LOADED.format('Mxfp4Config')}",
    "bitsandbytes": (
        f"{ORIGINAL}, or load it with transformers, call model.dequantize(), and save it with save_pretrained()"
    ),
}
# Endings of the names of tensors, and the scheme that writes tensors with such names.
SCHEME_NAMES = (
    (re.compile(r"\.weight_scale_inv$"), "fp8"),
    (re.compile(r"\.weight_(packed|scale)$"), "compressed-tensors"),
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.qzeros$"), "gptq or awq"),
    (re.compile(r"\.weight\.(absmax|quant_state\.\w+|quant_map|nested_absmax)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"_blocks$"), "mxfp4"),
    (re.compile(r"\.weight\._(data|scale|shift|zeropoint)$"), "optimum-quanto"),
)
SCALE = re.compile(r"\.weight_scale(_inv)?$")
CODE_DTYPES = {"I8", "U8", "I16", "U16", "I32", "U32"}  # position ids and indices are I64, masks are BOOL
# CODES matches the end of the name of a tensor of codes, and _WORDS are the words in the names of companions.
CODES = re.compile(r"(^|[._])(q_?weight|w_q|weight_q|weight_packed|q_?data|int_data|qidxs)$", re.IGNORECASE)
CODES_OF_ANY_DTYPE = re.compile(r"\.W_q$")  # HQQ may store its bytes as if they were floats
_WORDS = r"q?scales?|scales?_inv|q?zeros?|zero_?points?|zp|absmax|codebooks?|centroids|quant_map|g_idx|scb|biases"
COMPANION = re.compile(rf"_?(?:{_WORDS})", re.IGNORECASE)
WEIGHT_OR_COMPANION = re.compile(rf"weight$|(^|[._])(?:{_WORDS})$", re.IGNORECASE)  # at the end of a tensor's name
SHARE = 0.2  # if integers in layers take more than this share of all bytes, they are codes, whatever their names are

# The scheme of a checkpoint with codes and tensors of such a name, if no rule above names the scheme.
CODED = (
    (re.compile(r"\.biases$"), "MLX"),
    (CODES_OF_ANY_DTYPE, "hqq"),
    (re.compile(r"\.Qidxs$"), "quip"),
    (re.compile(r"\.code(s|books)$"), "aqlm"),
)


COMPUTED = {"fp8", "compressed-tensors", "fbgemm_fp8", "mxfp4"}  # methods with tensors whose values can be computed
TRAINED = {"bitnet"}  # methods whose models have plain weights, and round them whenever they compute


class Codes(NamedTuple):
    """A tensor that has codes in place of numbers.

    Attributes:
        tensor: The tensor.
        beside: The name of the tensor that shows that these are codes; None if the tensor itself does.
    """

    tensor: TensorInfo
    beside: str | None

    def __str__(self) -> str:
        near = f", beside {self.beside!r}" if self.beside else ""
        return f"{self.tensor.name!r} is {self.tensor.dtype} {list(self.tensor.shape)}{near}"


def config_entry(config: Mapping[str, Any]) -> str | None:
    """Return the method that config.json names; None if it has no entry of a quantisation."""
    entry: Any = config.get("quantization_config") or config.get("compression_config")
    inner = config.get("text_config")
    if not entry and isinstance(inner, Mapping):
        entry = inner.get("quantization_config") or inner.get("compression_config")
    if entry:
        return str((entry.get("quant_method") or "unknown") if isinstance(entry, dict) else entry)
    return "MLX" if isinstance(config.get("quantization"), dict) else None


def find_scheme(checkpoint: ModelTensors, quantized: QuantizedTensors | None = None) -> str | None:
    """Return the name of the quantisation scheme; None for a checkpoint of plain numbers.

    Args:
        checkpoint: The checkpoint.
        quantized: The tensors whose values can be computed, which count as plain numbers here.
    """
    entry = config_entry(checkpoint.config)
    tensors = checkpoint.tensors
    if quantized is not None and quantized.found and entry in (None, *COMPUTED):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in quantized.companions}
    elif entry is not None:
        return entry
    else:
        for name, found in QUANTIZATION_FILES.items():
            if name in checkpoint.files:
                return found
    return _scheme_of(tensors)


def _scheme_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the name of the scheme that tensors show; None for plain numbers."""
    for pattern, found in SCHEME_NAMES:
        if any(pattern.search(name) and _is_companion(name, tensors) for name in tensors):
            return found
    if find_codes(tensors) is None:
        return None
    return next((found for pattern, found in CODED if any(map(pattern.search, tensors))), "unknown")


def is_left_over(checkpoint: ModelTensors) -> bool:
    """Return True if config.json has an entry of a quantisation and all weights are plain numbers.

    Such an entry is left when a model was dequantised, or when an adapter was trained on a quantised copy of its base.
    """
    entry = config_entry(checkpoint.config)
    if entry is None or entry in TRAINED or any(name in checkpoint.files for name in QUANTIZATION_FILES):
        return False
    tensors = checkpoint.tensors
    if any(tensor.dtype.startswith(("F8", "F6", "F4")) for tensor in tensors.values()):
        return False
    return _scheme_of(tensors) is None


def _is_companion(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return True if the tensor with this name belongs to codes: a scale beside plain numbers is a weight itself."""
    if name.endswith("_blocks"):
        return tensors[name].dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in tensors
    weight = tensors.get(SCALE.sub(".weight", name)) if SCALE.search(name) else None
    return weight is None or weight.dtype not in ITEMSIZE


def find_codes(tensors: Mapping[str, TensorInfo]) -> Codes | None:
    """Return a tensor of codes, whatever the scheme; None if the model has none.

    A matrix of integers has codes if its name is that of a weight or of codes, if other layers have numbers under this
    name, or if its module has a companion, such as scales. A companion of integers has codes beside a weight of the
    same module.
    """
    integers = [tensor for tensor in tensors.values() if _may_be_codes(tensor)]
    if not integers:
        return None
    numbers = {mask_numbers(name) for name, tensor in tensors.items() if tensor.dtype in ITEMSIZE}
    modules: dict[str, list[str]] = defaultdict(list)
    for name in filter(WEIGHT_OR_COMPANION.search, tensors):  # a module of thousands of tensors has few of these
        for module in _modules(name):
            modules[module].append(name)
    for tensor in integers:
        near = [other for module in _modules(tensor.name) for other in modules[module] if other != tensor.name]
        companion = next((other for other in near if _is_named_for(other, tensor.name)), None)
        if _has_codes(tensor, companion, mask_numbers(tensor.name) in numbers):
            return Codes(tensor, companion)
        weight = next((other for other in near if other.endswith("weight")), None)
        if weight is not None and _is_named_for(tensor.name, weight):
            return Codes(tensor, weight)
    coded = [tensor for tensor in integers if mask_numbers(tensor.name) != tensor.name and not _is_table(tensor)]
    if sum(tensor.nbytes for tensor in coded) > SHARE * sum(tensor.nbytes for tensor in tensors.values()):
        return Codes(max(coded, key=lambda tensor: tensor.nbytes), None)
    return None


def _may_be_codes(tensor: TensorInfo) -> bool:
    """Return True for integers that are no buffer, and for names that codes of any dtype have."""
    integers = tensor.dtype in INTEGERS and not is_buffer(tensor)
    return integers or CODES_OF_ANY_DTYPE.search(tensor.name) is not None


def _is_named_for(companion: str, tensor: str) -> bool:
    """Return True for the name of another tensor's companion: `scales`, or `up_proj_scale` beside `up_proj`."""
    leaf, other = companion.rpartition(".")[2], tensor.rpartition(".")[2]
    for stem in (f"{other}_", "weight_"):
        leaf = leaf.removeprefix(stem)
    return COMPANION.fullmatch(leaf) is not None


def _has_codes(tensor: TensorInfo, companion: str | None, in_other_layers: bool) -> bool:
    """Return True if a tensor has codes, as its name, the dtypes in other layers, or a companion show."""
    leaf = tensor.name.rpartition(".")[2]
    if tensor.dtype not in INTEGERS or (leaf == "weight" and tensor.shape):
        return True
    if len(tensor.shape) < 2:
        return False
    if in_other_layers or CODES.search(tensor.name):
        return True
    return companion is not None and tensor.dtype in CODE_DTYPES and not _is_table(tensor)


def _is_table(tensor: TensorInfo) -> bool:
    """Return True for positions, masks and indices, which are integers in plain models too."""
    leaf = tensor.name.rpartition(".")[2]
    return tensor.dtype == "BOOL" or any(word in leaf for word in ("position", "mask", "index"))


def _modules(name: str) -> Iterator[str]:
    """Yield the module that a tensor belongs to, and for `proj.weight._data` the one above its weight too."""
    module = name.rpartition(".")[0]
    yield module
    if module.endswith(".weight"):
        yield module.removesuffix(".weight")


def describe_problem(role: str, checkpoint: ModelTensors) -> str | None:
    """Return why a quantised checkpoint cannot be extrapolated, and the way out; None for one that is not quantised."""
    found = find_scheme(checkpoint)
    if found is None:
        return None
    codes = find_codes(checkpoint.tensors)
    shown = f" ({codes})" if codes else ""
    problems = find_quantized(checkpoint.tensors, checkpoint.config).problems if found in COMPUTED else []
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        shown = f" ({'; '.join(problems[:SHOWN])}{more})"
    return (
        f"{role} {checkpoint.path} is quantised (quant_method {found}): its numbers are codes{shown} that cannot be "
        f"extrapolated; {WAYS_OUT.get(found, ORIGINAL)}"
    )
