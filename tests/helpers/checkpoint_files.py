"""Write and read small checkpoints in raw bytes, by the format's rules alone and without the code under test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Tensors by name: (safetensors dtype, shape, bytes).
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# These tensors have integers, a scalar, no elements, or more bytes than several small chunks.
ODD_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "count": ("I64", (5,)),
    "mask": ("BOOL", (7,)),
    "bytes": ("U8", (3, 3)),
    "scalar": ("BF16", ()),
    "empty": ("F32", (0, 4)),
    "hollow": ("BF16", (0,)),
    "long": ("BF16", (100, 333)),
}

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1, "U8": 1}


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None, pad: int = 0) -> bytes:
    """Return the bytes of a file with the tensors in this order.

    The header ends with `pad` spaces, so that the offsets of tensors may be odd.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def write_folder(
    folder: Path,
    tensors: Tensors,
    shards: int | Sequence[Sequence[str]] = 0,
    config: Mapping[str, Any] | None = None,
    pad: int = 0,
) -> Path:
    """Write a folder with one model.safetensors (shards=0), or with an index and shards, and return it.

    `shards` is the number of shards, or the names of the tensors in each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "llama"}))
    if not shards:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}, pad))
        return folder
    names = list(tensors)
    groups = [names[i::shards] for i in range(shards)] if isinstance(shards, int) else shards
    weight_map = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        data = safetensors_bytes({name: tensors[name] for name in group}, {"format": "pt"}, pad)
        (folder / file).write_bytes(data)
        weight_map.update(dict.fromkeys(group, file))
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def random_tensors(shapes: Mapping[str, tuple[str, tuple[int, ...]]], seed: int, scale: float = 0.02) -> Tensors:
    """Return normal weights of these (dtype, shape); integers count up from the seed."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (dtype, shape) in shapes.items():
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        made[name] = (dtype, shape, _encode(values, dtype, seed))
    return made


def _encode(values: Any, dtype: str, seed: int) -> bytes:
    if dtype == "BF16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    if dtype in kinds:
        return values.astype(kinds[dtype]).tobytes()
    count = np.arange(seed, seed + values.size)
    return (count % 2 if dtype == "BOOL" else count % 251).astype({1: "u1", 8: "<i8"}[ITEMSIZE[dtype]]).tobytes()


def read_file(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the tensors of one file, in the order of their data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
    return found


def read_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the tensors of all .safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in read_file(path).items()}


def fingerprint(*places: Path) -> dict[str, bytes]:
    """Return the digest of every file in these folders and of these files, by path; links are followed."""
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {str(path): hashlib.sha256(path.read_bytes()).digest() for path in files if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the digests of all files in a folder, by their paths in it, so that equal folders have equal digests."""
    return {name.removeprefix(f"{folder}/"): digest for name, digest in fingerprint(folder).items()}


def staging_folder(out: Path) -> Path:
    """Return the staging folder of an output, in which a merge that fails keeps the finished part."""
    return out.parent / f".{out.name}.expo-staging"


def kept(*outs: Path) -> str:
    """Return the end of the message of a merge that has left its staging folders."""
    folders = ", ".join(str(staging_folder(out)) for out in outs)
    return f"the finished part is kept in {folders}: repeat the merge with `resume=True` to continue"


def sparse_file(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write a safetensors file of zeros that takes no space on a disk that supports sparse files."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        stop = offset + ITEMSIZE[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


# The tensors are of every kind, and small enough for chunks of some KiB.
MIXED_SHAPES = {**ODD_SHAPES, "embed": ("BF16", (301, 97)), "half": ("F16", (77, 51)), "full": ("F32", (340, 341))}


def mixed_pair(folder: Path) -> tuple[Path, Path]:
    """Write sft and aligned with MIXED_SHAPES, in different shards."""
    sft = write_folder(folder / "sft", random_tensors(MIXED_SHAPES, 1), shards=2)
    return sft, write_folder(folder / "aligned", random_tensors(MIXED_SHAPES, 2), shards=3, pad=1)
