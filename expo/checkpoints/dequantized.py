"""Present a quantised checkpoint with the values of its tensors, which readers compute as they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .checkpoint import Checkpoint
from .quantization import config_entry, find_scheme, is_left_over
from .quantized_tensors import QuantizedTensor, QuantizedTensors, find_quantized
from .reader import ByteReader, FileReader
from .safetensors_header import TensorInfo, element_count
from .scaled_reader import ITEM, ScaledReader, TransposedReader

KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the values of its quantised tensors, in fp32, in the place of elements and scales.

    The config has no entry of a quantisation then, and neither if all weights are plain numbers. A checkpoint with a
    scheme that is not known stays as it is, and the plan refuses it.
    """
    entry = config_entry(checkpoint.config)
    if is_left_over(checkpoint):
        note = (
            f"{checkpoint.path}: config.json has an entry of a quantisation ({entry}), and the weights are plain "
            "numbers: the entry is not used, and the output has none"
        )
        return replace(_without_entry(checkpoint), notes=(*checkpoint.notes, note))
    quantized = find_quantized(checkpoint.tensors, checkpoint.config)
    if not quantized.found or quantized.problems or find_scheme(checkpoint, quantized) is not None:
        return checkpoint
    places = {tensor.codes.name: name for name, tensor in quantized.found.items()}
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in places:
            shape = quantized.found[places[name]].shape
            tensors[places[name]] = TensorInfo(places[name], "F32", shape, 0, ITEM * element_count(shape))
        elif name not in quantized.companions:
            tensors[name] = tensor
    weight_map = {places.get(name, name): file for name, file in checkpoint.weight_map.items()}
    views = {name: _reader(checkpoint, tensor) for name, tensor in quantized.found.items()}
    notes = (*checkpoint.notes, _note(checkpoint, quantized))
    return replace(
        _without_entry(checkpoint), tensors=tensors, weight_map={name: weight_map[name] for name in tensors},
        views=views, dequantized=frozenset(views), notes=notes,
    )  # fmt: skip


def _reader(checkpoint: Checkpoint, tensor: QuantizedTensor) -> ByteReader:
    """Return the reader of the values of a tensor."""
    readers = [checkpoint.reader(each.name) for each in (tensor.codes, tensor.scales)]
    if tensor.dtype != "F4":
        return ScaledReader(tensor, *readers)
    codes, scales = (reader for reader in readers if isinstance(reader, FileReader))
    return TransposedReader(tensor, codes, scales)


def _note(checkpoint: Checkpoint, quantized: QuantizedTensors) -> str:
    """Return the sentence for the user about the tensors that are dequantised, and about scales that nothing needs."""
    counts = Counter(map(str, quantized.found.values()))
    used = {part.name for tensor in quantized.found.values() for part in (tensor.codes, tensor.scales)}
    others = sorted(quantized.companions - used)
    left_out = f"; scales of activations are left out: {len(others)}, such as {others[0]}" if others else ""
    kinds = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    total = counts.total()
    return (
        f"{checkpoint.path}: {total} quantised tensor{'s' * (total != 1)} ({kinds}), extrapolated from the values, "
        f"element times scale in fp32; an output has bf16 in their place and no quantisation{left_out}"
    )


def _without_entry(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose config has no entry of a quantisation."""
    config = _clean(checkpoint.config)
    return replace(checkpoint, config=config, config_changed=config != checkpoint.config)


def _clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the entry, also in the configs of models inside."""
    return {
        key: _clean(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in KEYS
    }
