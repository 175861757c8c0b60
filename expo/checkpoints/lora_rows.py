"""LoRA of modules in memory whose weights are rows of files' tensors, or are made of several files' tensors.

transformers cuts some tensors of files into the weights of several modules as it loads a model: `attn.qkv.weight` into
those of q_proj, k_proj and v_proj. The factors of these modules are the blocks of one product for the tensor of the
file: a left factor that has each module's B in the module's rows and in columns of its own, and a right factor that has
each module's A in rows of its own. Other tensors are joined in memory, such as gate_proj and up_proj to gate_up_proj;
each has its rows of the module's B, and all of A.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..dtypes import ITEMSIZE
from ..errors import CheckpointError
from .adapter import FactorPart, LowRank
from .layouts import find_layouts
from .lora_config import MERGE, Scales
from .lora_file import ModuleFactors, check_rank
from .naming import unwrap
from .safetensors_header import TensorInfo

CUT, JOINED = (("chunk", 0),), (("concatenate", 0),)


class _Rows(NamedTuple):
    """The rows [start, stop) of a file's tensor for a module, or of a module for a file's tensor."""

    tensor: TensorInfo
    start: int
    stop: int


def find_row_deltas(
    path: str,
    scales: Scales,
    missing: Sequence[ModuleFactors],
    base: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> tuple[dict[str, LowRank], list[ModuleFactors]]:
    """Return the deltas of tensors that are cut or joined in memory, and the factors that belong to no such tensor.

    Args:
        path: The adapter's file.
        scales: The ranks and scales in the config.
        missing: The factors of the modules whose weights the base does not have.
        base: The tensors of the base by name.
        config: The base's config.json.

    Raises:
        CheckpointError: The factors do not fit the tensors.
    """
    cut, joined = _find_rows(base, config) if missing else ({}, {})
    found: dict[str, LowRank] = {}
    blocks: dict[str, list[tuple[int, LowRank]]] = defaultdict(list)
    others = []
    for factors in missing:
        weight = f"{unwrap(factors.module)}.weight"
        rows = [cut[weight]] if weight in cut else joined.get(weight, [])
        if not rows:
            others.append(factors)
            continue
        _check(path, factors, rows, scales)
        scale = scales.scale_of(factors.module)
        for tensor, start, stop in rows:
            part = None if weight in cut else FactorPart(1, 0, start, stop)
            delta = LowRank(factors.b, factors.a, False, False, scale, path, part)
            if part is None:
                blocks[tensor.name].append((start, delta))
            elif found.setdefault(tensor.name, delta) is not delta:
                raise CheckpointError(f"{path}: two factors for sft's {tensor.name!r}: save two adapters apart")
    for name, own in blocks.items():
        found[name] = _joined(path, base[name], own)
    return found, others


def _find_rows(
    base: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, _Rows], dict[str, list[_Rows]]]:
    """Return the rows of a file's tensor for each weight that is cut out of it, and those of each joined weight."""
    layout = next(iter(find_layouts(config)), None) if config.get("model_type") else None
    cut: dict[str, _Rows] = {}
    sources: dict[str, dict[int, TensorInfo]] = defaultdict(dict)
    for name, tensor in base.items() if layout is not None else ():
        assert layout is not None
        place = layout.find_place(layout.rename(name)) if len(tensor.shape) == 2 else None
        if place is None:
            continue
        targets = [target.replace("language_model.model.", "language_model.", 1) for target in place.targets]
        if place.fusion.operations == CUT and tensor.shape[0] % len(targets) == 0:
            size = tensor.shape[0] // len(targets)
            cut |= {target: _Rows(tensor, k * size, (k + 1) * size) for k, target in enumerate(targets)}
        elif place.fusion.operations == JOINED:
            sources[targets[0]][place.source] = tensor
    joined = {}
    for target, tensors in sources.items():
        ends = [sum(tensors[k].shape[0] for k in sorted(tensors) if k <= source) for source in sorted(tensors)]
        if sorted(tensors) == list(range(len(tensors))):
            parts = zip((tensors[k] for k in sorted(tensors)), (0, *ends), ends, strict=False)
            joined[target] = [_Rows(*part) for part in parts]
    return cut, joined


def _check(path: str, factors: ModuleFactors, rows: Sequence[_Rows], scales: Scales) -> None:
    """Raise CheckpointError if the factors of a module do not have the shape of these rows."""
    check_rank(path, factors, scales)
    height = sum(each.stop - each.start for each in rows)
    for tensor, _, _ in rows:
        if tensor.dtype not in ITEMSIZE or (height, tensor.shape[1]) != (factors.b.shape[0], factors.a.shape[1]):
            raise CheckpointError(
                f"{path}: {factors.b.name!r} {list(factors.b.shape)} times {factors.a.name!r} "
                f"{list(factors.a.shape)} belongs to {height} rows of sft's {tensor.name!r}, which is {tensor.dtype} "
                f"{list(tensor.shape)}; {MERGE}"
            )


def _joined(path: str, tensor: TensorInfo, own: Sequence[tuple[int, LowRank]]) -> LowRank:
    """Return the delta of a file's tensor out of the deltas of its runs of rows.

    Raises CheckpointError if the runs have different scales or dtypes, because the product has one of each.
    """
    first = own[0][1]
    if len({row for row, _ in own}) < len(own):
        raise CheckpointError(
            f"{path}: two factors for the same rows of sft's {tensor.name!r}: save two adapters apart"
        )
    if len({(delta.scale, delta.left.dtype, delta.right.dtype) for _, delta in own}) > 1:
        raise CheckpointError(
            f"{path}: the factors of the modules that sft's {tensor.name!r} has in one tensor differ in scale or "
            f"dtype, which is not read; {MERGE}"
        )
    return first._replace(blocks=tuple(own), rows=tensor.shape[0])
