"""A PEFT LoRA adapter over its base: the tensors of the base that it changes, and by how much.

An adapter folder has adapter_config.json and adapter_model.safetensors. For a module with weight W the file has the
factors lora_A [r, in] and lora_B [out, r], and the trained weight is W + scale * B @ A, as PEFT's merge_and_unload()
computes it. The modules of modules_to_save, trained biases and saved embeddings are whole tensors. Anything else in the
config or in the file is refused by name, so that nothing that was trained is dropped. Opening an adapter reads headers
alone, with one exception: if two tensors of the file belong to one tensor of the base, their data are compared, because
they must be equal. Source: github.com/huggingface/peft, tuners/lora/layer.py and model.py.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..dtypes import ITEMSIZE
from ..errors import CheckpointError
from .adapter import Adapter, LowRank
from .files import ADAPTER, ADAPTER_BIN, ADAPTER_CONFIG, WHOLE_MODELS, load_json
from .lora_config import BASE, MERGE, TIED_ELSEWHERE, Scales, check_config, shortened
from .lora_data import are_equal
from .lora_experts import find_expert_deltas
from .lora_file import ModuleFactors, check_rank, names_without_wrappers, sort_tensors
from .lora_rows import find_row_deltas
from .memory_names import MemoryNames
from .naming import unwrap
from .renames import NameIndex, names_with_other_prefixes
from .safetensors_header import TensorInfo
from .shard import Shard
from .weight_files import open_shard

TWICE = "both change sft's"
SHOWN = 5  # names that a message lists


class _Target(NamedTuple):
    """A tensor of the base that the factors of one module change.

    Attributes:
        factors: The factors.
        tensor: The base's tensor.
        transposed: The forms of the delta that fit the tensor's shape: False for B @ A, True for its transpose.
    """

    factors: ModuleFactors
    tensor: TensorInfo
    transposed: frozenset[bool]


def is_adapter(folder: str) -> bool:
    """Return True if a folder has an adapter and no whole model.

    A whole model may keep the config of an adapter that was merged into it.
    """
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)) and not any(
        os.path.exists(os.path.join(folder, name)) for name in WHOLE_MODELS
    )


def open_adapter(folder: str, base: Mapping[str, TensorInfo], base_config: Mapping[str, Any] | None = None) -> Adapter:
    """Read the header of an adapter and find the base's tensor for each of its own.

    Args:
        folder: The adapter's folder.
        base: The tensors of the base by name.
        base_config: The base's config.json, which decides about the names that its tensors have in memory.

    Raises:
        CheckpointError: The adapter cannot be read, or is not one over this base. The message names file and tensor.
    """
    config_path = os.path.join(folder, ADAPTER_CONFIG)
    config = load_json(config_path)
    check_config(config_path, config)
    shard = _open_weights(folder)
    all_factors, others = sort_tensors(shard)
    index = _BaseNames(base, MemoryNames(base_config or {}))
    low_rank = _all_deltas(shard.path, config_path, config, all_factors, index, base_config or {})
    try:
        whole = _whole_tensors(shard, config, others, index)
    finally:
        shard.reader.close()  # an open reader keeps other processes from writing to the file; a read opens it again
    if not low_rank and not whole:
        raise CheckpointError(f"{shard.path}: neither factors nor whole tensors in it: nothing was trained")
    full = {name: tensor for name, tensor in whole.items() if name not in low_rank}
    copies = {name: tensor for name, tensor in whole.items() if name in low_rank}
    _check_saved_modules(folder, config, full, base)
    _check_shapes(shard.path, copies, base)
    return Adapter(folder, config, shard, low_rank, full, copies)


def _open_weights(folder: str) -> Shard:
    """Open the weight file of an adapter: .safetensors if the folder has it, else .bin. Raises CheckpointError."""
    path, pickled = os.path.join(folder, ADAPTER), os.path.join(folder, ADAPTER_BIN)
    if os.path.exists(path):
        return open_shard(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: a broken link; download it again")
    if not os.path.exists(pickled):
        raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} is in it, but no {ADAPTER}; download it again")
    return open_shard(pickled)


def _all_deltas(
    path: str,
    config_path: str,
    config: Mapping[str, Any],
    all_factors: Sequence[ModuleFactors],
    index: _BaseNames,
    base_config: Mapping[str, Any],
) -> dict[str, LowRank]:
    """Return the deltas by the base's names of the tensors, also of those that transformers fuses as it loads a model.

    Raises CheckpointError.
    """
    scales = Scales(config_path, config)
    experts, all_factors = find_expert_deltas(path, config, scales, all_factors, index.base, base_config)
    missing = [factors for factors in all_factors if index.find(f"{factors.module}.weight") is None]
    rows, unknown = find_row_deltas(path, scales, missing, index.base, base_config)
    found_rows = {factors.module for factors in missing} - {factors.module for factors in unknown}
    plain = [factors for factors in all_factors if factors.module not in found_rows]
    found: dict[str, LowRank] = {}
    for deltas in (_low_rank(path, config, scales, plain, index), rows, experts):
        for name in found.keys() & deltas.keys():
            raise CheckpointError(f"{path}: {found[name].left.name!r} and {deltas[name].left.name!r} {TWICE} {name!r}")
        found |= deltas
    return found


def _low_rank(
    path: str,
    config: Mapping[str, Any],
    scales: Scales,
    all_factors: Sequence[ModuleFactors],
    index: _BaseNames,
) -> dict[str, LowRank]:
    """Return the deltas by the base's names of the tensors. Raises CheckpointError."""
    targets = _find_targets(path, config, all_factors, index)
    # Shapes show for most modules whether the delta is transposed. Modules with the same last part of the name agree.
    shown: dict[str, set[bool]] = defaultdict(set)
    for factors, _, fits in targets.values():
        if len(fits) == 1 and not factors.embedding:
            shown[_last_part(factors)] |= fits
    found = {}
    for name, target in targets.items():
        check_rank(path, target.factors, scales)
        left, right = target.factors.b, target.factors.a
        transposed = _is_transposed(path, config, target, shown)
        if transposed:  # (B @ A).T = A.T @ B.T
            left, right = right, left
        found[name] = LowRank(left, right, transposed, transposed, scales.scale_of(target.factors.module), path)
    return found


def _find_targets(
    path: str, config: Mapping[str, Any], all_factors: Sequence[ModuleFactors], index: _BaseNames
) -> dict[str, _Target]:
    """Return the targets of all factors, by the base's names of the tensors. Raises CheckpointError."""
    names = {factors.module: index.find(f"{factors.module}.weight") for factors in all_factors}
    missing = [module for module, name in names.items() if name is None]
    if missing:
        raise CheckpointError(_not_in_base(path, config, missing, "module"))
    targets: dict[str, _Target] = {}
    for factors in all_factors:
        name = names[factors.module] or ""
        if name in targets:
            raise CheckpointError(
                f"{path}: {targets[name].factors.a.name!r} and {factors.a.name!r} {TWICE} {name!r}: two adapters in "
                "one file; save them apart"
            )
        tensor = index.base[name]
        targets[name] = _Target(factors, tensor, _forms_that_fit(path, factors, tensor))
    return targets


def _forms_that_fit(path: str, factors: ModuleFactors, tensor: TensorInfo) -> frozenset[bool]:
    """Return the forms of a delta that have the tensor's shape: False for B @ A, True for its transpose.

    An embedding's delta is always transposed.

    Raises:
        CheckpointError: No form has the tensor's shape, or the tensor's dtype cannot be extrapolated.
    """
    if tensor.dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{path}: {factors.a.name!r} is a factor for sft's {tensor.name!r}, which is {tensor.dtype}, but one of "
            f"{', '.join(ITEMSIZE)} is needed; give the base as it was before it was quantised"
        )
    plain = (factors.b.shape[0], factors.a.shape[1])
    fits = {False} if plain == tensor.shape and not factors.embedding else set()
    if plain[::-1] == tensor.shape:
        fits.add(True)
    if not fits:
        forms = "the transpose of the product" if factors.embedding else "the product or its transpose"
        raise CheckpointError(
            f"{path}: {factors.b.name!r} {list(factors.b.shape)} times {factors.a.name!r} {list(factors.a.shape)} is a "
            f"{list(plain)}, but sft's {tensor.name!r} is {list(tensor.shape)}, and {forms} must have that shape; "
            f"{BASE}"
        )
    return frozenset(fits)


def _is_transposed(path: str, config: Mapping[str, Any], target: _Target, shown: Mapping[str, set[bool]]) -> bool:
    """Return True if the delta is (B @ A).T, as for an embedding and for GPT-2's Conv1D, which is [in, out].

    A square weight fits both forms, so only the config's fan_in_fan_out can decide. PEFT changes this setting at each
    module of the other kind, and saves the setting of the last module. If shapes show that the adapter has modules of
    both kinds, the setting is therefore not used, and the modules with the same last part of the name decide.

    Args:
        path: The adapter's file, for messages.
        config: The adapter's config.
        target: The weight and its factors.
        shown: The forms that the shapes of other modules show, by the last part of the module's name.

    Raises:
        CheckpointError: Neither the config nor another module decides.
    """
    if len(target.transposed) == 1:
        return next(iter(target.transposed))
    configured = bool(config.get("fan_in_fan_out"))
    if all(found == {configured} for found in shown.values()):
        return configured
    alike = shown.get(_last_part(target.factors), set())
    if len(alike) != 1:
        raise CheckpointError(
            f"{path}: {target.tensor.name!r} is square, and nothing shows whether it is stored as [in, out] or [out, "
            f"in]: fan_in_fan_out is {configured}, but not for all modules; {MERGE}"
        )
    return next(iter(alike))


def _last_part(factors: ModuleFactors) -> str:
    return factors.module.rpartition(".")[2]


def _whole_tensors(
    shard: Shard, config: Mapping[str, Any], others: Sequence[TensorInfo], index: _BaseNames
) -> dict[str, TensorInfo]:
    """Return the whole tensors by the base's names, also those that have a delta. Raises CheckpointError."""
    found: dict[str, TensorInfo] = {}
    missing = []
    for tensor in others:
        if ".original_module." in tensor.name:  # the base's own tensor, beside one of modules_to_save
            continue
        name = next(filter(None, map(index.find, names_without_wrappers(tensor.name))), None)
        if name is None:
            missing.append(tensor)
        elif name not in found:
            found[name] = tensor
        elif not are_equal(shard, found[name], tensor):  # PEFT may save one of modules_to_save as an embedding again
            raise CheckpointError(
                f"{shard.path}: {found[name].name!r} and {tensor.name!r} both stand for sft's {name!r}, and "
                f"differ; {MERGE}"
            )
    unknown = [tensor.name for tensor in missing if not _is_second_name(shard, tensor, found.values())]
    if unknown:
        raise CheckpointError(_not_in_base(shard.path, config, unknown, "tensor"))
    return found


def _is_second_name(shard: Shard, tensor: TensorInfo, found: Iterable[TensorInfo]) -> bool:
    """Return True if a matrix has the data of a tensor that was found.

    If the head is tied to the embedding, PEFT saves the same matrix under both names.
    """
    return len(tensor.shape) == 2 and any(are_equal(shard, tensor, other) for other in found)


class _BaseNames:
    """An index that finds the base's name for a tensor of the model that was trained.

    Attributes:
        base: The base's tensors by name.
    """

    def __init__(self, base: Mapping[str, TensorInfo], memory_names: MemoryNames) -> None:
        self.base = base
        self._index: NameIndex | None = None
        self._memory_names = memory_names
        self._by_memory_name: dict[str, list[str]] = {}
        for name in base if memory_names else ():
            self._by_memory_name.setdefault(memory_names.find(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the base's name for a name of the model that was trained; None if no name fits, or several do."""
        found = next((each for each in _likely_names(name) if each in self.base), None)
        if found is not None:
            return found
        # A rename may match its own result, so the name is looked up as it is before it is renamed.
        for memory_name in (unwrap(name), self._memory_names.find(name)):
            same = self._by_memory_name.get(memory_name, [])
            if len(same) == 1:
                return same[0]
        self._index = self._index or NameIndex(self.base)
        fits = self._index.find(name)
        return fits.pop() if len(fits) == 1 else None


def _likely_names(name: str) -> Iterator[str]:
    """Yield the names that a tensor of the trained model may have in the base, the likeliest first."""
    yield name
    yield from names_with_other_prefixes(name)


def _not_in_base(path: str, config: Mapping[str, Any], names: Sequence[str], kind: str) -> str:
    """Return the message about modules or tensors of the adapter that the base lacks."""
    trained = config.get("base_model_name_or_path")
    over = f" (its config says {shortened(trained)})" if trained else ""
    count = f"{len(names)} {kind}{'s' * (len(names) > 1)}"
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    hint = ""
    if any(re.search(r"(^|\.)(lm_head|embed_out)(\.|$)", name) for name in names):
        hint = f"; if that is a head that sft ties to its embedding: {TIED_ELSEWHERE}"
    return (
        f"{path}: {count} of the adapter that sft does not have: {', '.join(names[:SHOWN])}{more}; is sft the "
        f"checkpoint that the adapter was trained from{over}?{hint}"
    )


def _check_saved_modules(
    folder: str, config: Mapping[str, Any], full: Mapping[str, TensorInfo], base: Mapping[str, Any]
) -> None:
    """Raise CheckpointError if a module of modules_to_save is in the base and not in the file: PEFT would refuse it."""
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise CheckpointError(
            f"{os.path.join(folder, ADAPTER_CONFIG)}: modules_to_save is {shortened(modules)}, not a list of names"
        )
    for module in modules:  # PEFT lists heads that a model may not have
        if any(f".{module}." in f".{name}" for name in base) and not any(f"{module}." in name for name in full):
            raise CheckpointError(
                f"{folder}: modules_to_save has {module!r}, which sft has too, but no tensor of it was saved; download "
                "it again"
            )


def _check_shapes(path: str, copies: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError if the adapter's copy of a base tensor has another shape, or no floating-point dtype."""
    for name, copy in copies.items():
        if copy.shape != base[name].shape or copy.dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{path}: {copy.name!r}, a copy of the base's tensor, is {copy.dtype} {list(copy.shape)}, but sft's "
                f"{name!r} is {base[name].dtype} {list(base[name].shape)}; {BASE}"
            )
