"""merge(): two checkpoints to a third, file to file; preview(): what it would do."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from .checkpoint import INDEX, Checkpoint, open_checkpoint
from .engines import Engine, crew
from .errors import CheckpointError, ExpoError, OutputError, PlanError, UsageError
from .plan import Action, Chunk, Plan, make_plan
from .progress import size
from .result import Merged, Tally
from .work import MIB, RING_SLOTS, Pass, Progress, Sink, Source, chunk_size
from .writer import ShardWriter, Staging, check_free, output_errors

StrPath = str | os.PathLike[str]
BASE_MEMORY = 25_000_000  # bytes: the interpreter with what a CPU merge imports
TORCH_MEMORY = 500_000_000  # about what torch and triton take once imported; a GPU's driver takes more


def merge(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Iterable[float],
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
    engine, device: see `engines.crew`. overwrite: replace an output. verify: read it back, compare, and then commit.
    progress(done, total): bytes of output, called in this thread. cancel: set it from any thread to stop.

    Nothing stands at `out` until the whole of it is durable; any exception removes what was written. Works from any
    thread, installs no signal handler, and releases the GIL while it computes and writes.
    Raises UsageError, EngineError, CheckpointError, PlanError, OutputError and Cancelled, all of them ExpoError.
    """
    began = time.perf_counter()
    choices = (alpha_for, on_unpaired, on_mismatch, engine, device, overwrite)
    with _prepare(sft, aligned, alpha, out, *choices) as (weak, strong, job):
        if job.error is not None:
            raise job.error
        plan, source, tally = job.plan, Source(weak, strong), Tally(len(job.plan.alphas))
        with ExitStack() as stack:
            stagings = [stack.enter_context(Staging(path, strong.folder is None, overwrite)) for path in job.outs]
            writers = _create(plan, stagings)
            work = Pass(plan, source, job.crew, _writing(writers), tally)
            with _closing_all(writers):
                work.run(_part(progress, 0, 1 + verify), cancel)
            if verify:
                Pass(plan, source, job.crew, _comparison(stagings)).run(_part(progress, 1, 2), cancel)
            for staging in stagings:
                _complete(plan, strong, staging)
            warnings = tally.warnings() + _commit(stagings)
    return Merged(
        outputs=tuple(tally.output(k, path, plan.alphas[k]) for k, path in enumerate(job.outs)),
        extrapolated=sum(step.action is Action.EXTRAPOLATE for step in plan.steps),
        copied=tuple((step.name, step.reason) for step in plan.steps if step.action is Action.COPY),
        dropped=plan.dropped,
        left_out=plan.left_out,
        bytes_read=plan.input_bytes,
        bytes_written=plan.output_bytes,
        seconds=time.perf_counter() - began,
        relative_distance=tally.relative_distance,
        max_abs_difference=tally.max_abs_d,
        engine=job.crew[0].name,
        why=job.crew[0].why,
        workers=len(job.crew),
        shares=work.shares,
        direct=all(writer.direct for files in writers for writer in files.values()),
        verified=verify,
        warnings=tuple(warnings),
    )


def _commit(stagings: Sequence[Staging]) -> list[str]:
    """Put the outputs in place, one by one; what stops it in between says which are there already."""
    try:
        return [note for staging in stagings for note in staging.commit()]
    except (KeyboardInterrupt, OutputError) as error:
        done = [staging.out for staging in stagings if staging.committed]
        if not done:
            raise
        before = f"{error}; " if isinstance(error, OutputError) else ""
        raise type(error)(f"{before}already in place: {', '.join(done)}") from error


def _part(progress: Progress | None, before: int, passes: int) -> Progress | None:
    """Progress of one pass of several as progress of all of them: each counts for its share of the bytes."""
    if progress is None:
        return None
    return lambda done, total: progress((before * total + done) // passes, total)


@dataclass(frozen=True)
class Preview:
    """What merge() would do, and with what.

    free: bytes that may still be written to the output's disk. error: what merge() would raise, or None.
    """

    plan: Plan
    outs: tuple[str, ...]
    crew: tuple[Engine, ...]
    free: int
    error: ExpoError | None

    @property
    def memory(self) -> int:
        """Bytes of memory it takes: buffers, the pages mapped at a time, and the interpreter."""
        outputs, size = len(self.outs), chunk_size(len(self.crew), len(self.outs))
        slots = sum(1 if engine.gpu is None else 1 + RING_SLOTS for engine in self.crew)
        on_gpu = any(engine.name == "triton" for engine in self.crew)
        return BASE_MEMORY + on_gpu * TORCH_MEMORY + slots * size * (outputs + 2)


def preview(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Iterable[float],
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
    with _prepare(sft, aligned, alpha, out, *choices) as (_, _, job):
        return job


@contextmanager
def _prepare(
    sft: StrPath,
    aligned: StrPath,
    alpha: float | Iterable[float],
    out: StrPath | None,
    alpha_for: Mapping[str, float] | None,
    on_unpaired: str,
    on_mismatch: str,
    engine: str,
    device: str,
    overwrite: bool,
) -> Iterator[tuple[Checkpoint, Checkpoint, Preview]]:
    """Open both checkpoints, plan, and find out whether the plan can be carried out."""
    alphas = alphas_of(alpha)
    workers = crew(engine, device)
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
        yield weak, strong, Preview(plan, outs, workers, free_bytes(outs[0]), error)


def alphas_of(alpha: float | Iterable[float]) -> tuple[float, ...]:
    """One number or several, as a tuple of floats. Raises UsageError."""
    try:
        values = tuple(alpha) if isinstance(alpha, Iterable) and not isinstance(alpha, str) else (alpha,)
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


def output_paths(out: StrPath | None, aligned: Checkpoint, alphas: Sequence[float]) -> tuple[str, ...]:
    """One path for each alpha. Raises UsageError where several alphas would share one."""
    suffix = ".safetensors" if aligned.folder is None else ""
    template = f"{aligned.name}-expo-{{alpha}}{suffix}" if out is None else os.fspath(out)
    if not template:
        raise UsageError("--out is empty: name a folder or a file")
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
            # A shard may be a link to a place outside the checkpoint's folder.
            for path in (checkpoint.path, *(shard.path for shard in checkpoint.shards.values())):
                source = os.path.realpath(path)
                if os.path.commonpath((place, source)) in (place, source):
                    raise OutputError(f"{out} is, contains or lies inside the input {path}; choose another --out")
    needed, free = plan.output_bytes, free_bytes(outs[0])
    if free < needed:
        raise OutputError(
            f"{outs[0]}: {size(needed)} are needed, but {size(free)} are free; free some space or choose another --out"
        )


def free_bytes(out: str) -> int:
    """Bytes that may still be written on the disk that `out` will be on."""
    folder = os.path.dirname(os.path.realpath(out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


Writers = list[dict[str, ShardWriter]]  # for each output, by the name of the shard


def _create(plan: Plan, stagings: Sequence[Staging]) -> Writers:
    """Allocate every file of every output, so that a disk that is too small shows before the work."""
    return [{shard.name: ShardWriter(staging.path(shard.name), shard) for shard in plan.shards} for staging in stagings]


def _writing(writers: Writers) -> Sink:
    """A sink that writes chunks at their places."""

    def sink(k: int, chunk: Chunk, data: memoryview) -> None:
        writers[k][chunk.shard.name].write(chunk.start, data, chunk.stop - chunk.start)

    return sink


@contextmanager
def _closing_all(writers: Writers) -> Iterator[None]:
    try:
        yield
    finally:
        for files in writers:
            for writer in files.values():
                writer.close()


def _comparison(stagings: Sequence[Staging]) -> Sink:
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
            staging.put(name, _parts(os.path.join(aligned.folder, name)))
        if plan.index is not None:
            staging.put(INDEX, [plan.index])


def _parts(path: str) -> Iterator[bytes]:
    """A file of aligned's, a MiB at a time. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            while part := file.read(MIB):
                yield part
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
