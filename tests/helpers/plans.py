"""Checkpoints that exist in memory only, and the plans of their merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from expo.checkpoints.checkpoint import Checkpoint
from expo.checkpoints.files import SINGLE
from expo.checkpoints.safetensors_header import Header, TensorInfo, element_count, parse
from expo.dtypes import BITS
from expo.options import MergeOptions
from expo.planning.matching import match_tensors
from expo.planning.plan import Plan, plan_output
from expo.planning.shards import Chunk
from expo.planning.steps import Action

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


EXTRAPOLATE, COPY = Action.EXTRAPOLATE, Action.COPY


ALPHA = 0.3


def checkpoint(
    tensors: Shapes,
    path: str = "/models/aligned",
    shards: Sequence[Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    index: Mapping[str, Any] | None = None,
    files: Sequence[str] = (),
) -> Checkpoint:
    """Return a checkpoint that exists in memory only, because a plan must need no files."""
    groups = {SINGLE: list(tensors)} if shards is None else {f"shard-{i}": list(g) for i, g in enumerate(shards)}
    infos: dict[str, TensorInfo] = {}
    weight_map = {}
    for file, names in groups.items():
        start = 101  # odd, because the files of other programs may have odd offsets
        for name in names:
            dtype, shape = tensors[name]
            stop = start + element_count(shape) * BITS[dtype] // 8
            infos[name] = TensorInfo(name, dtype, shape, start, stop)
            weight_map[name] = file
            start = stop
    opened: dict[str, Any] = {
        file: SimpleNamespace(header=Header(tuple(infos[name] for name in names), dict(metadata or {})))
        for file, names in groups.items()
    }
    if shards is not None and index is None:
        index = {"weight_map": weight_map}
    return Checkpoint(
        path, path, opened, infos, weight_map, dict(config or {}), index and dict(index), dict.fromkeys(files, "")
    )


def fates(plan: Plan) -> dict[str, tuple[Action, str]]:
    return {step.name: (step.action, step.reason) for step in plan.steps}


def check_cut(plan: Plan, chunks: Sequence[Chunk], size: int) -> None:
    by_shard: dict[str, list[Chunk]] = {shard.name: [] for shard in plan.shards}
    for chunk in chunks:
        by_shard[chunk.shard.name].append(chunk)
    assert [chunk.shard.name for chunk in chunks] == [name for name, own in by_shard.items() for _ in own]
    for shard in plan.shards:
        own = by_shard[shard.name]
        assert [chunk.start for chunk in own] == list(range(0, shard.size, size)), "the chunks tile the file"
        assert [chunk.stop for chunk in own] == [chunk.start for chunk in own[1:]] + [shard.size]
        header = {t.name: t for t in parse(shard.name, shard.header[8:], shard.size).tensors}
        reached = dict.fromkeys(header, 0)
        for chunk in own:
            end = max(len(shard.header) - chunk.start, 0)
            for step, start, stop, at in chunk.pieces:
                placed, bits = header[step.name], BITS[step.aligned.dtype]
                assert start == reached[step.name] < stop, "the pieces tile the tensor, in order, none empty"
                assert chunk.start + at == placed.start + start, "where the header says"
                assert at == end, "the pieces tile the chunk"
                assert at + stop - start <= chunk.stop - chunk.start
                if bits >= 8:
                    assert start * 8 % bits == 0, "no element straddles a cut"
                    assert stop * 8 % bits == 0
                reached[step.name], end = stop, at + stop - start
            assert end == chunk.stop - chunk.start or chunk.stop <= len(shard.header)
        assert reached == {name: tensor.nbytes for name, tensor in header.items()}


def make_plan(
    sft: Checkpoint,
    aligned: Checkpoint,
    alphas: Sequence[float],
    alpha_for: Mapping[str, float] | None = None,
    **options: Any,
) -> Plan:
    """Return the plan of a merge with these options."""
    chosen = MergeOptions(alphas=tuple(alphas), alpha_for=alpha_for or {}, **options)
    return plan_output(aligned, match_tensors(sft, aligned, chosen), chosen)
