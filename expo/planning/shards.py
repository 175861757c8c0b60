"""Lay out the output's weight files: the tensors of each file, the place of every byte, and the index.

An output has aligned's division into shards, or new shards of the size that the user names, and always headers of its
own. A chunk is a run of bytes of an output shard, of a fixed size, whatever the sizes of the tensors in it.
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
from .steps import Step, join_shapes

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint


PARTS_SHARD_BYTES = 5 * 10**9  # of tensors in a file, if aligned is in parts, whose division no output has


class OutputShard(NamedTuple):
    """One weight file of the output.

    Attributes:
        name: The file's name.
        header: The first bytes of the file: the length of the safetensors header, and the header.
        size: The size of the file in bytes.
        steps: The steps in the order of their data, each with a TensorInfo of the place of its bytes in this file.
    """

    name: str
    header: bytes
    size: int
    steps: tuple[tuple[Step, TensorInfo], ...]


def lay_out(aligned: Checkpoint, steps: Sequence[Step], max_bytes: int | None) -> tuple[OutputShard, ...]:
    """Return the weight files of an output.

    Args:
        aligned: The checkpoint whose shards the output takes over if `max_bytes` is None.
        steps: The steps of the output; the steps of one tensor go into one file.
        max_bytes: The largest number of tensor bytes in a file; None for aligned's division into files.
    """
    tensors: dict[str, list[Step]] = {}
    for step in steps:
        tensors.setdefault(step.name, []).append(step)
    if max_bytes is None:
        groups: dict[str, list[str]] = {output_name(name): [] for name in aligned.shards}
        for name in tensors:  # a checkpoint in parts has another division than its output
            groups.setdefault(output_name(aligned.weight_map[name]), []).append(name)
        metadata = {output_name(name): file.header.metadata for name, file in aligned.shards.items()}
    else:
        groups, metadata = _by_size(tensors, max_bytes), {}
    return tuple(
        _make_shard(file, {name: tensors[name] for name in group}, metadata.get(file, {}))
        for file, group in groups.items()
        if group  # later shards may have every tensor of a shard
    )


def output_name(shard: str) -> str:
    """Return the output's file name for a shard of aligned, such as `model.safetensors` for `pytorch_model.bin`."""
    stem, suffix = os.path.splitext(shard)
    return stem.replace("pytorch_model", "model", 1) + ".safetensors" if suffix in PICKLED else shard


def _by_size(tensors: Mapping[str, Sequence[Step]], max_bytes: int) -> dict[str, list[str]]:
    """Return the names of the tensors in each file, with the file names that save_pretrained gives.

    A file has at most `max_bytes` bytes of tensors; a larger tensor has a file to itself.
    """
    groups: list[list[str]] = []
    free = 0  # bytes that the last file can still take
    for name, steps in tensors.items():
        size = sum(step.nbytes for step in steps)
        if size > max(free, 0) or not groups:
            groups.append([])
            free = max_bytes
        groups[-1].append(name)
        free -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{k + 1:05}-of-{len(groups):05}.safetensors": group for k, group in enumerate(groups)}


def _make_shard(file: str, tensors: Mapping[str, Sequence[Step]], metadata: Mapping[str, str]) -> OutputShard:
    """Return the weight file that holds these tensors."""
    entries = ((name, steps[0].dtype, join_shapes(steps)) for name, steps in tensors.items())
    header, placed = emit(entries, {"format": "pt", **metadata})  # transformers expects a format
    parts = []
    for tensor in placed.values():
        start = tensor.start
        for step in tensors[tensor.name]:
            parts.append((step, TensorInfo(tensor.name, step.dtype, step.shape, start, start + step.nbytes)))
            start += step.nbytes
    size = len(header) + sum(tensor.nbytes for tensor in placed.values())
    return OutputShard(file, header, size, tuple(parts))


def make_index(aligned: Checkpoint, shards: Sequence[OutputShard], resharded: bool) -> bytes | None:
    """Return the bytes of the index file; None for an output without an index.

    Args:
        aligned: The checkpoint whose index's metadata the output takes over.
        shards: The weight files of the output.
        resharded: True if the output has shards of a new size; False if it has aligned's division into files.
    """
    if len(shards) == 1 if resharded else aligned.index is None:
        return None
    metadata = aligned.index.get("metadata") if aligned.index else None
    placed = {step.name: shard.name for shard in shards for step, _ in shard.steps}
    total = sum(step.nbytes for shard in shards for step, _ in shard.steps)
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": dict(sorted(placed.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode("ascii")  # transformers writes an index with escapes, in ASCII


class Piece(NamedTuple):
    """The part of a chunk that belongs to one step.

    Attributes:
        step: The step that computes the piece.
        start: The piece's first byte, counted from the first byte of the step's output.
        stop: The byte after the piece's last one, counted from the first byte of the step's output.
        at: The piece's first byte, counted from the first byte of the chunk.
    """

    step: Step
    start: int
    stop: int
    at: int


class Chunk(NamedTuple):
    """Bytes [start, stop) of an output shard, which may be a part of a tensor, many tensors, and a part of the header.

    Attributes:
        shard: The output shard.
        start: The chunk's first byte in the shard's file.
        stop: The byte after the chunk's last.
        pieces: The parts of the chunk that belong to steps, in the order of their bytes.
    """

    shard: OutputShard
    start: int
    stop: int
    pieces: tuple[Piece, ...]


ChunkStatistics = dict[int, Statistics]  # the statistics of pieces, by the piece's position in `Chunk.pieces`


def cut(shards: Sequence[OutputShard], size: int) -> Iterator[Chunk]:
    """Yield the chunks of the output, each of `size` bytes at most.

    No element lies in two chunks: `size` and the start of the data are multiples of 4096, and tensors of wide dtypes
    come first.
    """
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
    """Yield the chunks that one rank computes: a run of the chunks that are not done.

    All ranks have the same number of bytes, with a difference of one chunk at most.

    Args:
        shards: The weight files of the output.
        size: The size of a chunk in bytes, a multiple of 4096.
        done: The chunks that are done. A key has the shard's name and the chunk's start. A value has the chunk's stop,
            and statistics that this function ignores.
        rank: The number of the rank, from 0.
        world: The number of ranks.
    """
    total = sum(shard.size for shard in shards) - sum(stop - start for (_, start), (stop, _) in done.items())
    before = 0  # bytes of the chunks that are not done and come before this one
    for chunk in cut(shards, size):
        if (chunk.shard.name, chunk.start) not in done:
            length = chunk.stop - chunk.start
            if (2 * before + length) * world // (2 * total) == rank:  # the chunk's middle lies in this rank's run
                yield chunk
            before += length
