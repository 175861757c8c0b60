"""The tensors in the file of a LoRA adapter, sorted by their names: the factors of modules, and whole tensors.

PEFT's wrappers add parts to the names. Source: github.com/huggingface/peft, tuners/lora/layer.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..dtypes import ITEMSIZE
from ..errors import CheckpointError
from .lora_config import MERGE, OTHER_KINDS, Scales
from .model_parts import EMPTY_HINT
from .safetensors_header import TensorInfo
from .shard import Shard

PREFIX = "base_model.model."  # PEFT's wrappers around the model put this before every name in the file

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])(\.(?P<name>[^.]+))?\.weight|"
    r"embedding_(?P<embedding>[AB])(\.(?P<embedding_name>[^.]+))?)"
)
_REFUSED = (
    (re.compile(r"\.lora_magnitude_vector(\.|$)"), OTHER_KINDS["use_dora"]),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), OTHER_KINDS["lora_bias"]),
    (re.compile(r"\.trainable_tokens_"), OTHER_KINDS["trainable_token_indices"]),
    (re.compile(r"\.lora_"), "neither lora_A nor lora_B"),
)


class ModuleFactors(NamedTuple):
    """The two factors of one module.

    Attributes:
        module: The module's name in the model that was trained.
        a: lora_A, of shape [r, in].
        b: lora_B, of shape [out, r].
        embedding: True if the module is an embedding.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool


def sort_tensors(shard: Shard) -> tuple[list[ModuleFactors], list[TensorInfo]]:
    """Return the factors of each module in the file, and all other tensors. Raises CheckpointError."""
    halves: dict[tuple[str, bool, str | None], dict[str, TensorInfo]] = defaultdict(dict)
    others = []
    for tensor in shard.header.tensors:
        match = _FACTOR.fullmatch(tensor.name)
        if match is not None:
            key = (match["module"], match["embedding"] is not None, match["name"] or match["embedding_name"])
            halves[key][match["linear"] or match["embedding"]] = tensor
            continue
        for pattern, what in _REFUSED:
            if pattern.search(tensor.name):
                raise CheckpointError(f"{shard.path}: {tensor.name!r}: {what}, which is not read; {MERGE}")
        others.append(tensor)
    all_factors = [
        _check_factors(shard.path, module, embedding, found) for (module, embedding, _), found in halves.items()
    ]
    return all_factors, others


def _check_factors(path: str, module: str, embedding: bool, halves: Mapping[str, TensorInfo]) -> ModuleFactors:
    """Return the factors of a module after a check of both. Raises CheckpointError."""
    if len(halves) < 2:
        half, tensor = next(iter(halves.items()))
        other = f"lora_{'embedding_' * embedding}{'AB'[half == 'A']}"
        raise CheckpointError(
            f"{path}: {tensor.name!r} is there, but {module!r} has no {other}: half a delta; download it again"
        )
    for tensor in halves.values():
        if tensor.dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{path}: {tensor.name!r} is {tensor.dtype}, but factors are one of {', '.join(ITEMSIZE)}; save the "
                "adapter as it was trained"
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise CheckpointError(f"{path}: {tensor.name!r} is {list(tensor.shape)}: {_no_matrix(tensor.shape)}")
    return ModuleFactors(module.removeprefix(PREFIX), halves["A"], halves["B"], embedding)


def check_rank(path: str, factors: ModuleFactors, scales: Scales) -> None:
    """Raise CheckpointError where a factor in the file `path` has another rank than the config gives its module."""
    rank = scales.rank_of(factors.module)
    for tensor, found in ((factors.a, factors.a.shape[0]), (factors.b, factors.b.shape[1])):
        if found != rank:
            raise CheckpointError(
                f"{path}: {tensor.name!r} {list(tensor.shape)} has the rank {found}, but {scales.path} gives "
                f"{factors.module!r} the rank {rank:g}; is it the config that was saved with the file?"
            )


def _no_matrix(shape: Sequence[int]) -> str:
    """Return the end of the message about a factor that is no matrix: the likely cause, and the way out."""
    if len(shape) > 2:
        return f"LoRA of a convolution, or of several matrices at once, which is not read; {MERGE}"
    return f"no matrix; {EMPTY_HINT}"


def names_without_wrappers(name: str) -> Iterator[str]:
    """Yield the names that a tensor of the file may have in the model: without PEFT's wrappers and adapter's name."""
    key = name.removeprefix(PREFIX)
    yield key
    for wrapper in (r"\.base_layer", r"\.modules_to_save", r"\.modules_to_save\.[^.]+"):
        yield re.sub(rf"{wrapper}(?=\.)", "", key, count=1)
