"""merge(): two checkpoints to a third, file to file; preview(): what it would do."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .engines import Engine, choose, worker_count
from .errors import ExpoError, OutputError, PlanError, UsageError
from .plan import Action, Chunk, Plan, make_plan
from .result import Merged, Tally
from .work import Pass, Progress, Source, chunk_size
from .writer import ShardWriter, Staging, check_free, output_errors

StrPath = str | os.PathLike[str]
BASE_MEMORY = 25_000_000  # bytes: the interpreter with what a CPU merge imports


def merge(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Sequence[float],
    out: StrPath | None = None,
    *,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    engine: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Merged:
    """Write aligned + alpha * (aligned - sft), the formula of ExPO (arXiv 2404.16792), as a new checkpoint.

    sft, aligned: a folder with model.safetensors or with shards and their index, or a bare .safetensors file; a folder
        gives a folder with aligned's config, tokenizer and code files, a file gives a file. Tensors of dtype BF16, F16,
        F32 and F64, in any mix, are extrapolated in fp32 (fp64 where one is F64) and rounded once to aligned's dtype;
        integers are copied from aligned.
    alpha: one number, or several: inputs are read once, and each alpha has its own output.
    out: where to write; with several alphas it contains "{alpha}". Default: "<aligned's name>-expo-{alpha}" here.
    alpha_for: regular expression on tensor names to the alpha used instead; the last match wins, 0 keeps aligned's.
    on_unpaired, on_mismatch: "error", or "aligned" to keep aligned's tensor where sft has none or one of another shape.
    engine, device: see `choose`. overwrite: replace an output. verify: read it back and compare before it is committed.
    progress(done, total): bytes of output, called in this thread. cancel: set it from any thread to stop.

    Nothing stands at `out` until the whole of it is durable; any exception removes what was written. Works from any
    thread, installs no signal handler, and releases the GIL while it computes and writes.
    Raises UsageError, EngineError, CheckpointError, PlanError, OutputError and Cancelled, all of them ExpoError.
    """
    began = time.perf_counter()
    choices = (alpha_for, on_unpaired, on_mismatch, engine, device, overwrite)
    with _prepare(sft, aligned, alpha, out, *choices) as job:
        if job.error is not None:
            raise job.error
        plan, source, tally = job.plan, Source(job.sft, job.aligned, job.engine), Tally(len(job.plan.alphas))
        with ExitStack() as stack:
            single = job.aligned.folder is None
            stagings = [stack.enter_context(Staging(path, single, overwrite)) for path in job.outs]
            direct = _write(plan, source, job.workers, stagings, tally, progress, cancel)
            if verify:
                Pass(plan, source, job.workers, _comparison(stagings)).run(progress, cancel)
            warnings = tally.warnings()
            for staging in stagings:
                _complete(plan, job.aligned, staging)
            for staging in stagings:
                if not staging.commit():
                    warnings.append(f"{staging.out} was replaced in two steps: this filesystem cannot swap folders")
    copied = tuple((step.name, step.reason) for step in plan.steps if step.action is Action.COPY)
    return Merged(
        outputs=tuple(tally.output(k, path, plan.alphas[k]) for k, path in enumerate(job.outs)),
        extrapolated=len(plan.steps) - len(copied),
        copied=copied,
        dropped=plan.dropped,
        left_out=plan.left_out,
        bytes_read=plan.input_bytes,
        bytes_written=plan.output_bytes,
        seconds=time.perf_counter() - began,
        relative_distance=tally.relative_distance,
        engine=job.engine.name,
        why=job.engine.why,
        workers=job.workers,
        direct=direct,
        verified=verify,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Preview:
    """What merge() would do. free, memory: bytes of disk and memory; error: what merge() would raise, or None."""

    plan: Plan
    outs: tuple[str, ...]
    free: int
    memory: int
    engine: str
    why: str
    workers: int
    error: ExpoError | None


def preview(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Sequence[float],
    out: StrPath | None = None,
    *,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    engine: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> Preview:
    """The plan of a merge with the same arguments, from headers alone; writes nothing.

    Raises what merge() raises where there is no plan at all: UsageError, EngineError, CheckpointError.
    """
    choices = (alpha_for, on_unpaired, on_mismatch, engine, device, overwrite)
    with _prepare(sft, aligned, alpha, out, *choices) as job:
        buffers = job.workers * chunk_size(job.workers, len(job.outs)) * (len(job.outs) + 2)
        free, engine_, why = free_bytes(job.outs[0]), job.engine.name, job.engine.why
        return Preview(job.plan, job.outs, free, BASE_MEMORY + buffers, engine_, why, job.workers, job.error)


@dataclass(frozen=True)
class _Job:
    sft: Checkpoint
    aligned: Checkpoint
    plan: Plan
    outs: tuple[str, ...]
    engine: Engine
    workers: int
    error: ExpoError | None  # why it must not be carried out


@contextmanager
def _prepare(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Sequence[float],
    out: StrPath | None,
    alpha_for: Mapping[str, float] | None,
    on_unpaired: str,
    on_mismatch: str,
    engine: str,
    device: str,
    overwrite: bool,
) -> Iterator[_Job]:
    """Open both checkpoints, plan, and find out whether the plan can be carried out."""
    alphas = alphas_of(alpha)
    chosen = choose(engine, device)
    with closing(open_checkpoint(sft)) as weak, closing(open_checkpoint(aligned)) as strong:
        plan = make_plan(weak, strong, alphas, alpha_for, on_unpaired, on_mismatch)
        outs = output_paths(out, strong, alphas)
        error: ExpoError | None = None
        try:
            plan.check()
            check_places(outs, plan, (weak, strong))
            for path in outs:
                check_free(path, strong.folder is None, overwrite)
        except (PlanError, OutputError) as found:
            error = found
        yield _Job(weak, strong, plan, outs, chosen, worker_count(chosen), error)


def alphas_of(alpha: float | Sequence[float]) -> tuple[float, ...]:
    """One number or several, as a tuple of floats. Raises UsageError."""
    values = alpha if isinstance(alpha, Sequence) and not isinstance(alpha, str) else (alpha,)
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


def output_paths(out: StrPath | None, aligned: Checkpoint, alphas: Sequence[float]) -> tuple[str, ...]:
    """One path for each alpha. Raises UsageError where several alphas would share one."""
    suffix = ".safetensors" if aligned.folder is None else ""
    template = f"{aligned.name}-expo-{{alpha}}{suffix}" if out is None else os.fspath(out)
    if len(alphas) > 1 and "{alpha}" not in template:
        raise UsageError(f"{len(alphas)} alphas need an output each: put {{alpha}} into --out, got {template!r}")
    return tuple(template.replace("{alpha}", alpha_text(alpha)) for alpha in alphas)


def alpha_text(alpha: float) -> str:
    """The shortest text that means this alpha: 0.3, 1, 1e-05."""
    return f"{alpha:g}" if float(f"{alpha:g}") == alpha else repr(alpha)


def check_places(outs: Sequence[str], plan: Plan, inputs: Sequence[Checkpoint]) -> None:
    """Raise OutputError where an output would touch an input, or would not fit on its disk."""
    for out in outs:
        place = os.path.realpath(out)
        for checkpoint in inputs:
            source = os.path.realpath(checkpoint.path)
            if os.path.commonpath((place, source)) in (place, source):
                raise OutputError(
                    f"{out} is, contains or lies inside the input {checkpoint.path}; choose another --out"
                )
    needed, free = plan.output_bytes, free_bytes(outs[0])
    if free < needed:
        raise OutputError(
            f"{outs[0]}: {needed} bytes are needed, but {free} are free; free some space or choose another --out"
        )


def free_bytes(out: str) -> int:
    """Bytes that may still be written on the disk that `out` will be on."""
    folder = os.path.dirname(os.path.realpath(out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _write(
    plan: Plan,
    source: Source,
    workers: int,
    stagings: Sequence[Staging],
    tally: Tally,
    progress: Progress | None,
    cancel: threading.Event | None,
) -> bool:
    """Write all shards of all outputs into staging; True where all of it went past the page cache."""
    writers = [
        {shard.name: ShardWriter(staging.path(shard.name), shard) for shard in plan.shards} for staging in stagings
    ]

    def sink(k: int, chunk: Chunk, data: memoryview) -> None:
        writers[k][chunk.shard.name].write(chunk.start, data, chunk.stop - chunk.start)

    try:
        Pass(plan, source, workers, sink, tally).run(progress, cancel)
    finally:
        for files in writers:
            for writer in files.values():
                writer.close()
    return all(writer.direct for files in writers for writer in files.values())


def _comparison(stagings: Sequence[Staging]) -> Any:
    """A sink that compares recomputed chunks with the staged files."""

    def sink(k: int, chunk: Chunk, data: memoryview) -> None:
        path = stagings[k].path(chunk.shard.name)
        length = chunk.stop - chunk.start
        with output_errors(path), open(path, "rb", buffering=0) as file:
            file.seek(chunk.start)
            found = file.read(length)
        expected = bytes(data[:length])
        if found != expected:
            at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), len(found))
            tensors = [piece.step.name for piece in chunk.pieces if piece.at <= at]
            where = f"in tensor {tensors[-1]}" if tensors else "in the header"
            raise OutputError(f"{path}: byte {chunk.start + at}, {where}, reads back otherwise than it was written")

    return sink


def _complete(plan: Plan, aligned: Checkpoint, staging: Staging) -> None:
    """Aligned's other files, and the index last of all."""
    if aligned.folder is not None:
        for name in plan.carried:
            with open(os.path.join(aligned.folder, name), "rb") as file:
                staging.put(name, file.read())
        if plan.index is not None:
            staging.put("model.safetensors.index.json", plan.index)
