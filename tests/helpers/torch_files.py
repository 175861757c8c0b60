"""Write checkpoints in PyTorch's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import (
    Tensors,
)

STORAGE = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "BOOL": torch.bool, "U8": torch.uint8,
}  # fmt: skip


def wide(data: bytes, dtype: str) -> Any:
    """Return the elements as float64, which is exact."""
    stored = np.frombuffer(data, STORAGE[dtype])
    if dtype == "BF16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    with np.errstate(invalid="ignore"):  # the conversion of a signalling NaN would warn
        return stored.astype(np.float64)


def state_dict(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors with the memory layouts of real state dicts.

    Matrices are transposed, tensors are parts of a larger one, and two tensors share one storage.
    """
    state = {name: as_torch(*tensor) for name, tensor in tensors.items()}
    for name, tensor in state.items():
        if tensor.dim() > 1:
            state[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if "cut" in state:
        state["cut"] = torch.cat([torch.ones(3, 9), torch.cat([state["cut"], torch.ones(40, 2)], 1)])[3:, :7]
    if "shared.too" in state:
        state["shared.too"] = state["shared"]
    return state


def write_bin(
    folder: Path, tensors: Tensors, shards: int = 0, zipped: bool = True, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder as `write_folder` does, but in PyTorch's own format."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    state, options = state_dict(tensors), {"_use_new_zipfile_serialization": zipped}
    if not shards:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in list(state)[i::shards]}, folder / file, **options)
        weight_map |= dict.fromkeys(list(state)[i::shards], file)
    index = {"metadata": {"total_size": 7, "mode": "fp16"}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def as_torch(dtype: str, shape: Sequence[int], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(tuple(shape), dtype=TORCH[dtype])
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(tuple(shape))
