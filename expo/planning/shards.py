"""The output's files: which tensor goes into which, every byte's place, and the index. Pure.

Shards are aligned's, or new ones of a size that the user names; every header is ours. A run of bytes of the output is a
Chunk, cut by bytes and never by tensor.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.files import SINGLE
from ..checkpoints.safetensors_header import TensorInfo, emit
from ..checkpoints.weight_files import PICKLED
from ..kernels.contract import Statistics
from .steps import Step, joined

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint


class OutputShard(NamedTuple):
    """One file of the output: its first bytes, its size in bytes, and the steps in the order of their data.

    A step's TensorInfo says where its bytes are in this file.
    """

    name: str
    header: bytes
    size: int
    steps: tuple[tuple[Step, TensorInfo], ...]


def lay_out(aligned: Checkpoint, steps: Sequence[Step], most: int | None) -> tuple[OutputShard, ...]:
    """Aligned's files and assignment, or files of at most `most` bytes of tensors in the same order."""
    tensors: dict[str, list[Step]] = {}
    for step in steps:
        tensors.setdefault(step.name, []).append(step)
    if most is None:
        groups: dict[str, list[str]] = {output_name(name): [] for name in aligned.shards}
        for name in tensors:
            groups[output_name(aligned.weight_map[name])].append(name)
        metadata = {output_name(name): file.header.metadata for name, file in aligned.shards.items()}
    else:
        groups, metadata = _by_size(tensors, most), {}
    return tuple(
        _file(name, {each: tensors[each] for each in group}, metadata.get(name, {})) for name, group in groups.items()
    )


def output_name(shard: str) -> str:
    """The file that the tensors of an input's file go to: pytorch_model-00001-of-00002.bin has another name here."""
    stem, suffix = os.path.splitext(shard)
    return stem.replace("pytorch_model", "model", 1) + ".safetensors" if suffix in PICKLED else shard


def _by_size(tensors: Mapping[str, Sequence[Step]], most: int) -> dict[str, list[str]]:
    """Names by file, as save_pretrained names files: a tensor larger than `most` has one of its own."""
    groups: list[list[str]] = []
    room = 0
    for name, steps in tensors.items():
        size = sum(step.nbytes for step in steps)
        if size > max(room, 0) or not groups:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{k + 1:05}-of-{len(groups):05}.safetensors": group for k, group in enumerate(groups)}


def _file(name: str, tensors: Mapping[str, Sequence[Step]], metadata: Mapping[str, str]) -> OutputShard:
    entries = ((each, steps[0].dtype, joined([step.shape for step in steps])) for each, steps in tensors.items())
    header, placed = emit(entries, {"format": "pt", **metadata})  # transformers wants to know the format
    parts = []
    for tensor in placed.values():
        start = tensor.start
        for step in tensors[tensor.name]:
            parts.append((step, TensorInfo(tensor.name, step.dtype, step.shape, start, start + step.nbytes)))
            start += step.nbytes
    size = len(header) + sum(tensor.nbytes for tensor in placed.values())
    return OutputShard(name, header, size, tuple(parts))


def index_of(aligned: Checkpoint, shards: Sequence[OutputShard], resharded: bool) -> bytes | None:
    """The index file's bytes; None for an output without one."""
    if len(shards) == 1 if resharded else aligned.index is None:
        return None
    metadata = aligned.index.get("metadata") if aligned.index else None
    placed = {step.name: shard.name for shard in shards for step, _ in shard.steps}
    total = sum(step.nbytes for shard in shards for step, _ in shard.steps)
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": dict(sorted(placed.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode("ascii")  # escaped as transformers does it


class Piece(NamedTuple):
    """A run of one step's bytes in a chunk: [start, stop) of the step's own bytes of output, at `at` in the chunk."""

    step: Step
    start: int
    stop: int
    at: int


class Chunk(NamedTuple):
    """Bytes [start, stop) of an output shard, cut by bytes: part of a tensor, or many tensors, or header too."""

    shard: OutputShard
    start: int
    stop: int
    pieces: tuple[Piece, ...]


Measured = dict[int, Statistics]  # the statistics of a chunk's pieces, by the number of the piece


def cut(shards: Sequence[OutputShard], size: int) -> Iterator[Chunk]:
    """The output's chunks of `size` bytes, a multiple of 4096, so that no element straddles a cut."""
    for shard in shards:
        first = 0  # the first step that reaches into the chunk
        for start in range(0, shard.size, size):
            stop = min(start + size, shard.size)
            pieces = []
            while first < len(shard.steps) and shard.steps[first][1].stop <= start:
                first += 1
            for step, placed in itertools.islice(shard.steps, first, None):
                if placed.start >= stop:
                    break
                low, high = max(placed.start, start), min(placed.stop, stop)
                if low < high:
                    pieces.append(Piece(step, low - placed.start, high - placed.start, low - start))
            yield Chunk(shard, start, stop, tuple(pieces))


def portion(
    shards: Sequence[OutputShard], size: int, done: Mapping[tuple[str, int], tuple[int, Any]], rank: int, world: int
) -> Iterator[Chunk]:
    """One rank's run of the chunks that are not done: the same number of bytes for each, to within a chunk.

    done: (shard's name, start) to the byte after the chunk's last, and what the caller knows of it.
    """
    total = sum(shard.size for shard in shards) - sum(stop - start for (_, start), (stop, _) in done.items())
    at = 0  # bytes before the chunk
    for chunk in cut(shards, size):
        if (chunk.shard.name, chunk.start) not in done:
            length = chunk.stop - chunk.start
            if (2 * at + length) * world // (2 * total) == rank:  # the rank whose run its middle is in
                yield chunk
            at += length
