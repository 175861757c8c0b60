"""Merge two checkpoints into a third, from files to files (`merge`), or plan this and write nothing (`preview`)."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from ..checkpoints.auto_class import auto_class
from ..checkpoints.checkpoint import Checkpoint, CommonBase, Origin
from ..checkpoints.sidecars import CARD, has_tokenizer
from ..dtypes import ITEMSIZE
from ..errors import CheckpointError, OutputError, RankError
from ..execution.worker_pool import Progress
from ..inputs.resolve import PairRequest, StrPath, complete_request
from ..options import MergeOptions
from ..output.journal import DoneChunks, Journal, differences
from ..output.staging import Staging
from ..text import alpha_text
from .coordinator import Coordinator
from .job import MergeJob, open_job
from .process_group import SingleProcess
from .rank_worker import RankWorker
from .result import Merged, Tally

MAX_CARD_CHARACTERS = 1 << 20  # the largest number of characters that are read of aligned's own card
Shares = tuple[dict[str, int], bool, list[str]]  # (bytes by engine, True if all writes used O_DIRECT, notes on GPUs)


def merge(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    alpha: float | Iterable[float] | None = None,
    out: StrPath | None = None,
    *,
    recipe: str | None = None,
    base: StrPath | None = None,
    adapter_over: str | None = None,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    carry: Sequence[str] = (),
    aligned_config: StrPath | None = None,
    engine: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    digest: bool = False,
    check: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    ranks: SingleProcess | None = None,
) -> Merged:
    """Write aligned + alpha * (aligned - sft), the formula of ExPO (arXiv 2404.16792), as a new checkpoint.

    No file appears at `out` until the whole output is durable. After an exception the finished part stays in a hidden
    folder beside `out`, which the message names, and `resume` continues from there. merge() works in any thread,
    installs no signal handler, and releases the GIL while it computes and writes.

    Args:
        sft: A folder as transformers saves it, of .safetensors or .bin files; one file of either kind; or a hub id
            "org/name[@revision]", which is downloaded.
        aligned: A checkpoint as for `sft`, or a folder with a PEFT LoRA adapter over sft. A folder gives a folder, with
            the files that aligned is loaded with and a model card; a file gives a file. Tensors of dtype BF16, F16, F32
            and F64, in any mix, are extrapolated in fp32 (in fp64 where one is F64) and rounded once to aligned's
            dtype; integers are copied from aligned.
        alpha: One number, or several: merge() then reads the inputs once and writes one output for each alpha.
        out: The output's path, which contains "{alpha}" for several alphas. The default is
            "<aligned's name>-expo-{alpha}" in the current folder.
        recipe: The name of a public pair, which gives sft, aligned and its published alpha unless they are passed.
        base: The checkpoint that two LoRA adapters, `sft` and `aligned`, belong to, in the forms of `sft`. The output
            is the whole model base + delta_sft + (1 + alpha) * (delta_aligned - delta_sft).
        adapter_over: The model that aligned's adapter was trained on: "base", or "sft" for the model that sft's adapter
            makes of the base, so that aligned - sft is the delta of aligned's adapter. None reads the adapter's config.
        alpha_for: Regular expressions on tensor names, each with the alpha of the tensors that match. If several match,
            the last one counts; alpha 0 keeps aligned's tensor.
        on_unpaired: "error", or "aligned" to keep a tensor of aligned that sft does not have.
        on_mismatch: "error"; "aligned" to keep a tensor of aligned that has another shape in sft; or "rows" to
            extrapolate the rows that both have.
        dtype: The output's dtype, "bf16", "fp16" or "fp32"; None for aligned's own dtypes.
        max_shard_size: The largest size of a file, in bytes or as "5GB"; None for aligned's own files.
        carry: Patterns (fnmatch, of paths in aligned's folder) of further files that the output gets, such as
            ["*.png"]. The files that a model is loaded with need no pattern.
        aligned_config: A folder with the config.json and the tokenizer of an aligned that is saved in the parts of a
            training's processes; None for the folder beside the parts.
        engine: See `expo.execution.engines.engines_for`.
        device: See `expo.execution.engines.engines_for`.
        overwrite: Replace an output that exists.
        resume: Continue from the finished part of an interrupted merge of the same inputs and options.
        verify: Read the output back and compare it with a second computation, by another engine on the CPU, before it
            is put in place.
        digest: Write SHA256SUMS too.
        check: Have transformers load each output, without its data, before it is put in place. Weights that are
            missing, unexpected, of another shape, or tied by the config but stored apart raise an OutputError. No
            custom code is run.
        quiet: Download without progress bars.
        progress: Called in this thread with (bytes of output done, bytes of output in all).
        cancel: Stops the merge when any thread sets it.
        ranks: The processes of `expo.ranks.join()` that make the merge together. All call merge() with the same
            arguments, each computes its part, and all return the same result after rank 0 has put the output in place.

    Returns:
        The paths of the outputs, and what was measured and counted.

    Raises:
        ExpoError: One of UsageError, EngineError, CheckpointError, PlanError, OutputError, RankError and Cancelled.
    """
    ranks = ranks or SingleProcess()
    with ranks.together(cancel):
        pair = complete_request(sft, aligned, alpha, recipe, base, adapter_over)
        options = MergeOptions(
            pair.alphas, alpha_for or {}, on_unpaired, on_mismatch, dtype, max_shard_size, carry,
            None if aligned_config is None else os.fspath(aligned_config), engine, device,
            overwrite, resume, verify, digest, check, quiet,
        )  # fmt: skip
        return merge_pair(pair, out, options, ranks, progress, cancel)


def merge_pair(
    pair: PairRequest,
    out: StrPath | None,
    options: MergeOptions,
    ranks: SingleProcess,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Merged:
    """Merge as `merge` does, with the options in one object. The caller has entered `ranks.together`."""
    began = time.perf_counter()
    with open_job(pair, out, options, ranks) as job, ExitStack() as stack:
        if job.error is not None:
            raise job.error
        loader = _loader(job.aligned) if options.check and not ranks.rank else None
        _check_agreement(ranks, {**job.identity, "--out": job.outs, "outputs in place": sorted(job.committed)})
        fill = partial(_fill, job, progress=progress, cancel=cancel)
        if ranks.rank:
            return _follow(job, fill)
        bare_file = job.aligned.folder is None
        stagings = {
            k: stack.enter_context(Staging(job.outs[k], bare_file, options.overwrite, options.resume))
            for k in job.staged
        }
        with Coordinator(job, stagings, Journal(job.journalled, job.identity)) as coordinator:
            coordinator.create()
            ranks.gather(coordinator.division)
            shares, direct, gpu_notes = fill(coordinator.worker)
            coordinator.collect()
            coordinator.complete(lambda k: _card(job, coordinator.tally, k))
            if loader is not None:
                coordinator.check(loader)
            notes = dict.fromkeys((*job.notes, *gpu_notes))
            warnings = [*notes, *coordinator.tally.warnings(), *coordinator.commit()]
        merged = _make_result(job, coordinator, shares, direct, time.perf_counter() - began, warnings)
        try:
            ranks.gather(merged)
        except (RankError, KeyboardInterrupt):
            # The output is in place, so a rank that is lost now is no error. A launcher that restarts the processes
            # needs the journal, in which they read that the merge is done.
            if ranks.restarts:
                return merged
        return replace(merged, warnings=merged.warnings + tuple(coordinator.remove_journal()))


def preview(pair: PairRequest, out: StrPath | None, options: MergeOptions) -> MergeJob:
    """Return the job of a merge, and write nothing to the disk except headers into the hub's cache.

    Raises:
        ExpoError: No plan can be made: UsageError, EngineError, CheckpointError, and OutputError for an `out` that
            is a mount point. The job's `error` has every other error that merge() would raise.
    """
    with open_job(pair, out, options, SingleProcess(), headers_only=True) as job:
        return job


def _make_result(
    job: MergeJob, coordinator: Coordinator, shares: dict[str, int], direct: bool, seconds: float, warnings: list[str]
) -> Merged:
    """Return the result of a merge that is in place."""
    plan, tally, engine = job.plan, coordinator.tally, job.engines[0]
    return Merged(
        outputs=tuple(tally.output(k, path, plan.alphas[k]) for k, path in enumerate(job.outs)),
        extrapolated=plan.extrapolated(),
        copied=plan.copied(),
        noted=plan.noted,
        dropped=tuple(plan.dropped.items()),
        left_out=plan.left_out,
        bytes_read=plan.input_bytes,
        bytes_written=plan.output_bytes,
        seconds=seconds,
        relative_distance=tally.relative_distance,
        max_abs_difference=tally.max_abs_d,
        engine=engine.name,
        why=engine.why,
        workers=len(job.engines),
        ranks=job.ranks.world,
        shares=shares,
        direct=direct,
        verified=job.options.verify,
        checked=job.options.check,
        resumed=coordinator.worker.resumed,
        warnings=tuple(warnings),
    )


def _loader(aligned: Checkpoint) -> Any:
    """Return the class of transformers that `--check` loads outputs with. Raises UsageError."""
    from .load_check import model_class

    return model_class(aligned)


def _fill(job: MergeJob, worker: RankWorker, progress: Progress | None, cancel: threading.Event | None) -> Shares:
    """Compute, sync and verify this rank's part, wait for the other ranks, and return the shares of all ranks."""
    passes = 1 + job.options.verify
    worker.compute(_progress_of_pass(progress, 0, passes), cancel)
    reports = job.ranks.gather((worker.shares, worker.direct))
    if job.options.verify:
        worker.verify(_progress_of_pass(progress, 1, passes), cancel)
    notes = [note for notes_of_rank in job.ranks.gather(list(worker.notes)) for note in notes_of_rank]
    shares = Counter[str]()
    for shares_of_rank, _ in reports:
        shares.update(shares_of_rank)
    return dict(shares), all(direct for _, direct in reports), list(dict.fromkeys(notes))


def _follow(job: MergeJob, fill: Callable[[RankWorker], Shares]) -> Merged:
    """Do the work of a rank other than 0: compute a part, and return the result that rank 0 sends."""
    chunk_bytes, stops = job.ranks.gather(None)[0]
    with closing(Journal(job.journalled, job.identity, job.ranks.rank)) as journal:
        journal.join(chunk_bytes)
        done: DoneChunks = {key: (stop, {}) for key, stop in stops.items()}
        with closing(RankWorker(job, journal, Tally(len(job.outs)), chunk_bytes, done)) as worker:
            try:
                fill(worker)
            except BaseException:
                with suppress(CheckpointError, OutputError):  # the chunks that the journal already has stay valid
                    worker.record()
                raise
    merged: Merged = job.ranks.gather(None)[0]
    return merged


def _check_agreement(ranks: SingleProcess, values: Mapping[str, Any]) -> None:
    """Raise RankError if the ranks have different inputs, options or outputs.

    Args:
        ranks: The processes of the merge.
        values: The values that must be equal on all ranks, as a JSON object.
    """
    own = json.loads(json.dumps(values))
    for rank, other in enumerate(ranks.gather(own)):
        if other != own:
            differing = "; ".join(differences(other, own))
            raise RankError(f"ranks {rank} and {ranks.rank} do not see the same merge: for {rank}, {differing}")


def _progress_of_pass(progress: Progress | None, before: int, passes: int) -> Progress:
    """Return a callback that scales the progress of one pass over the output to that of all passes.

    Args:
        progress: The callback for all passes.
        before: The number of passes that are done.
        passes: The number of all passes.
    """

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress((before * total + done) // passes, total)

    return report


def _card(job: MergeJob, tally: Tally, k: int) -> bytes:
    """Return the bytes of README.md, the model card, of output k."""
    from .model_card import CardFacts, card_text

    alpha, plan, aligned = job.plan.alphas[k], job.plan, job.aligned
    readme = aligned.files.get(CARD)
    facts = CardFacts(
        sft=job.sft.origin or Origin(job.sft.name),
        aligned=aligned.origin or Origin(aligned.name),
        alpha=alpha,
        rules=job.options.alpha_for,
        options=job.options.changed(),
        command=_command_line(job, alpha),
        name=f"{aligned.name}-expo-{alpha_text(alpha)}",
        readme=None if readme is None else _read_text(readme),
        output=tally.output(k, job.outs[k], alpha),
        relative_distance=tally.relative_distance,
        max_abs_difference=tally.max_abs_d,
        extrapolated=plan.extrapolated(k),
        copied=plan.copied(k),
        dropped=tuple(plan.dropped.items()),
        dtype=", ".join(sorted({step.dtype for step in plan.steps if step.dtype in ITEMSIZE})),
        tokenizer=has_tokenizer(plan.carried),
        code=any(name.endswith(".py") for name in plan.carried),
        auto_class=auto_class(aligned.config),
        base=aligned.common_base,
    )
    return card_text(facts).encode()


def _read_text(path: str) -> str:
    """Return the first MAX_CARD_CHARACTERS characters of a file. Raises CheckpointError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_CARD_CHARACTERS)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _command_line(job: MergeJob, alpha: float) -> str:
    """Return the command line that reproduces an output, without the output path.

    A model has the same card wherever it is written.
    """
    words = ["python", "-m", "expo.fast", "--sft", _public_name(job.pair.sft, job.sft)]
    words += ["--aligned", _public_name(job.pair.aligned, job.aligned)]
    base = job.aligned.common_base
    if base is not None:
        words += ["--base", _public_base(base), "--adapter-over", base.adapter_over]
    return shlex.join([*words, *job.options.to_argv(alpha)])


def _public_base(base: CommonBase) -> str:
    """Return the name of two adapters' base: a hub id as the user gave it, or the last part of a local path."""
    if not os.path.lexists(base.name):
        return base.name
    return "@".join(filter(None, base.origin))


def _public_name(name: StrPath, checkpoint: Checkpoint) -> str:
    """Return a hub id as the user gave it, or the last part of a local path, because the rest may be private."""
    name = os.fspath(name)
    if name != checkpoint.path:
        return name
    return "@".join(filter(None, checkpoint.origin)) if checkpoint.origin else os.path.basename(os.path.abspath(name))
