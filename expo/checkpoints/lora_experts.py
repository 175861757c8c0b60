"""LoRA of fused experts: PEFT's `target_parameters` on a model that transformers has fused as it loaded the files.

In memory the experts of a layer are one tensor [experts, out, in], and the files have a tensor for each expert. PEFT
stores one pair of factors for all experts, lora_A [experts * r, in] and lora_B [out, r * experts], and the delta of
expert e is scale * B[:, e::experts] @ A[e * r : (e + 1) * r]. A published tensor is a run of these rows, such as
gate_proj in gate_up_proj. If a module has several such parameters, PEFT nests its wrappers, so the names of the factors
do not say which parameter is which, and the shapes decide. Source: github.com/huggingface/peft, tuners/lora/layer.py,
class ParamWrapper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..dtypes import ITEMSIZE
from ..errors import CheckpointError
from .adapter import FactorPart, LowRank
from .layouts import find_layouts
from .lora_config import MERGE, Scales, shortened
from .lora_file import ModuleFactors
from .naming import unwrap
from .safetensors_header import TensorInfo

_NESTED = re.compile(r"\.base_layer(?=\.|$)")


class _Parameter(NamedTuple):
    """A fused parameter in memory, and the tensors of files that it is made of.

    Attributes:
        name: Its name in memory.
        shape: Its shape in memory, [experts, out, in].
        parts: The tensor of each expert, with the first row of the tensor among the rows of the expert.
    """

    name: str
    shape: tuple[int, int, int]
    parts: tuple[tuple[int, int, TensorInfo], ...]


def find_expert_deltas(
    path: str,
    config: Mapping[str, Any],
    scales: Scales,
    all_factors: Sequence[ModuleFactors],
    base: Mapping[str, TensorInfo],
    base_config: Mapping[str, Any],
) -> tuple[dict[str, LowRank], list[ModuleFactors]]:
    """Return the deltas of experts by the base's names, and the factors of all other modules.

    Args:
        path: The adapter's file.
        config: The adapter's config.
        scales: The ranks and scales in the config.
        all_factors: The factors in the file.
        base: The tensors of the base by name.
        base_config: The base's config.json.

    Raises:
        CheckpointError: The adapter changes a parameter that is neither a module's weight nor made of files' experts.
    """
    targets = config.get("target_parameters") or []
    if not targets:
        return {}, list(all_factors)
    parameters = [each for each in _find_parameters(base, base_config) if _is_target(each.name, targets)]
    found: dict[str, LowRank] = {}
    others, used = [], set()
    for factors in all_factors:
        module = _NESTED.sub("", factors.module)
        fits = [each for each in parameters if each.name.rpartition(".")[0] == unwrap(module)]
        if not fits:
            others.append(factors)
            continue
        parameter = _choose(path, factors, fits)
        if parameter.name in used:
            raise CheckpointError(f"{path}: two factors for {parameter.name!r}: save two adapters apart")
        used.add(parameter.name)
        found |= _deltas(path, factors, f"{module}.{parameter.name.rpartition('.')[2]}", parameter, scales)
    unknown = [
        target for target in targets
        if not str(target).endswith(".weight") and not any(_is_target(name, [target]) for name in used)
    ]  # fmt: skip
    if unknown:
        raise CheckpointError(
            f"{scales.path}: target_parameters has {shortened(unknown[0])}: LoRA of a parameter that is no module's "
            f"weight and not made of sft's tensors for each expert, which is not read; {MERGE}"
        )
    return found, others


def _is_target(name: str, targets: Sequence[Any]) -> bool:
    """Return True if a parameter's name is one of these, or ends with one of them after a dot, as in PEFT."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _find_parameters(base: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[_Parameter]:
    """Yield the parameters in memory that stack all experts' tensors of a layer, with their rows one after another."""
    layout = next(iter(find_layouts(config)), None) if config.get("model_type") else None
    groups: dict[str, dict[tuple[int, int], TensorInfo]] = {}
    for name, tensor in base.items() if layout is not None else ():
        assert layout is not None
        place = layout.find_place(layout.rename(name))
        if place is None or place.fusion.operations not in (
            (("stack", 0),), (("stack", 0), ("concatenate", 1))
        ):  # fmt: skip
            continue
        target = place.targets[0].replace("language_model.model.", "language_model.", 1)
        groups.setdefault(target, {})[place.source, place.expert] = tensor
    for target, tensors in groups.items():
        sources, experts = (1 + max(key[side] for key in tensors) for side in (0, 1))
        if len(tensors) < sources * experts or any(len(each.shape) != 2 for each in tensors.values()):
            continue
        starts = [sum(tensors[before, 0].shape[0] for before in range(source)) for source in range(sources + 1)]
        width = tensors[0, 0].shape[1]
        if all(each.shape == (starts[key[0] + 1] - starts[key[0]], width) for key, each in tensors.items()):
            parts = tuple((expert, starts[source], each) for (source, expert), each in tensors.items())
            yield _Parameter(target, (experts, starts[-1], width), parts)


def _choose(path: str, factors: ModuleFactors, fits: Sequence[_Parameter]) -> _Parameter:
    """Return the parameter whose shape the factors have. Raises CheckpointError if none or several have it."""
    shape = factors.b.shape[0], factors.a.shape[1]
    chosen = [each for each in fits if each.shape[1:] == shape and factors.a.shape[0] == factors.b.shape[1]]
    if len(chosen) != 1:
        shapes = ", ".join(f"{each.name} {list(each.shape)}" for each in fits)
        raise CheckpointError(
            f"{path}: {factors.b.name!r} {list(factors.b.shape)} times {factors.a.name!r} {list(factors.a.shape)} fits "
            f"{'several' if chosen else 'none'} of the experts' parameters {shapes}; {MERGE}"
        )
    return chosen[0]


def _deltas(path: str, factors: ModuleFactors, name: str, parameter: _Parameter, scales: Scales) -> dict[str, LowRank]:
    """Return the delta of each expert's tensor by its name in the base.

    Raises CheckpointError if the factors have another rank than the config says, or a tensor cannot be extrapolated.
    """
    experts, rank = parameter.shape[0], scales.rank_of(name)
    if factors.a.shape[0] != experts * rank:
        raise CheckpointError(
            f"{path}: {factors.a.name!r} {list(factors.a.shape)} is for {experts} experts, but {scales.path} gives "
            f"{name!r} the rank {rank:g}; is it the config that was saved with the file?"
        )
    found = {}
    for expert, start, tensor in parameter.parts:
        if tensor.dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{path}: {factors.a.name!r} is a factor for sft's {tensor.name!r}, which is {tensor.dtype}, but one "
                f"of {', '.join(ITEMSIZE)} is needed; give the base as it was before it was quantised"
            )
        part = FactorPart(experts, expert, start, start + tensor.shape[0])
        found[tensor.name] = LowRank(factors.b, factors.a, False, False, scales.scale_of(name), path, part)
    return found
