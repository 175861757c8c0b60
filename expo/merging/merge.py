"""merge(): two checkpoints to a third, file to file; preview(): what it would do."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..checkpoints import tokenizer as tokens
from ..checkpoints.checkpoint import Checkpoint, Origin
from ..checkpoints.custom_code import find_code
from ..checkpoints.model_parts import tie_flag
from ..checkpoints.sidecars import CARD, has_tokenizer, missing_modules
from ..dtypes import ITEMSIZE
from ..errors import CheckpointError, ExpoError, OutputError, PlanError, RankError, UsageError
from ..execution.engines import Engine, crew
from ..execution.tensor_source import CONVERTING, FACTORS, Source
from ..execution.worker_pool import RING_SLOTS, Progress, chunk_size
from ..inputs.resolve import StrPath, Wanted, open_inputs, wanted
from ..output.journal import Done, Journal, differences, has_journal
from ..output.mounts import refuse_mount_point
from ..output.staging import Staging, check_free, held, staging_folder
from ..planning.plan import Plan, Rules, check_arguments, make_plan
from ..text import size_text
from .coordinator import Making
from .process_group import Alone
from .rank_worker import Filling
from .result import Merged, Tally

BASE_MEMORY = 25_000_000  # bytes: the interpreter with what a CPU merge imports
MAX_CARD = 1 << 20  # characters of aligned's own card that are read
Fill = Callable[[Filling], tuple[dict[str, int], bool, list[str]]]
TORCH_MEMORY = 500_000_000  # about what torch and triton take once imported; a GPU's driver takes more


def merge(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    alpha: float | Iterable[float] | None = None,
    out: StrPath | None = None,
    *,
    recipe: str | None = None,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    carry: Sequence[str] = (),
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
    ranks: Alone | None = None,
) -> Merged:
    """Write aligned + alpha * (aligned - sft), the formula of ExPO (arXiv 2404.16792), as a new checkpoint.

    sft, aligned: a folder as transformers saves it, of .safetensors or .bin files, a bare file of either kind, or a hub
        id "org/name[@revision]", which is downloaded; aligned may be a PEFT LoRA adapter over sft. A folder gives a
        folder with the files that aligned is loaded with and a model card, a file gives a file; weights are
        written as safetensors. Tensors of dtype BF16, F16, F32 and F64, in any mix, are extrapolated in fp32 (fp64
        where one is F64) and rounded once to aligned's dtype; integers are copied from aligned.
    alpha: one number, or several: inputs are read once, and each alpha has its own output.
    out: where to write; with several alphas it contains "{alpha}". Default: "<aligned's name>-expo-{alpha}" here.
    recipe: the name of a published pair, which gives those of sft, aligned and alpha that are left out.
    alpha_for: regular expression on tensor names to the alpha used instead; the last match wins, 0 keeps aligned's.
    on_unpaired: "error", or "aligned" to keep aligned's tensor where sft has none. on_mismatch: "error", "aligned" to
        keep aligned's where sft's has another shape, or "rows" to extrapolate the rows that both have.
    dtype: of the output, "bf16", "fp16" or "fp32"; aligned's own by default. max_shard_size: bytes of an output's file,
        or "5GB"; aligned's own files by default.
    carry: patterns (fnmatch, of paths in aligned's folder) of files that come along into the output beside those that a
        model is loaded with, such as ["*.png"].
    engine, device: see `engines.crew`. overwrite: replace an output. verify: read it back, compare, and then commit.
    quiet: download without progress bars. progress(done, total): bytes of output, called in this thread. cancel: set
        it from any thread to stop.

    resume: go on with what an interrupted merge of the same inputs and options has left. digest: write SHA256SUMS too.
    check: have transformers load each output, without its data, before it is put in place: weights that are missing,
        unexpected, of another shape or tied and stored apart are an OutputError. No custom code is run.
    ranks: of `ranks.join()`, where several processes make the merge together; all must call this with the same
        arguments. Each fills its part of the output, and all return the same when rank 0 has put it in place.

    Nothing stands at `out` until the whole of it is durable. An exception leaves what was done in a hidden folder
    beside it, from which `resume` goes on, and the message says so. Works from any thread, installs no signal handler,
    and releases the GIL while it computes and writes.
    Raises UsageError, EngineError, CheckpointError, PlanError, OutputError, RankError and Cancelled, all of them
    ExpoError.
    """
    began = time.perf_counter()
    want = wanted(sft, aligned, alpha, recipe)
    rules = Rules(alpha_for or {}, on_unpaired, on_mismatch, dtype, max_shard_size, carry)
    ranks = ranks or Alone()
    fill = partial(_fill, ranks=ranks, verify=verify, progress=progress, cancel=cancel)
    with (
        ranks.together(cancel),
        _prepare(want, out, rules, engine, device, overwrite, resume, quiet, ranks) as (weak, strong, job),
        ExitStack() as stack,
    ):
        if job.error is not None:
            raise job.error
        loader = _loader(strong) if check and not ranks.rank else None
        identity = _identity(weak, strong, job.plan, rules)
        _agree(ranks, {**identity, "--out": job.outs, "what is in place": sorted(job.committed)})
        if ranks.rank:
            return _follow(weak, strong, job, identity, ranks, fill)
        stagings = {
            k: stack.enter_context(Staging(path, strong.folder is None, overwrite, resume))
            for k, path in enumerate(job.outs)
            if path not in job.committed
        }
        journal = Journal(job.journalled, identity)
        with Making(job.plan, Source(weak, strong), job.crew, stagings, journal, ranks, resume, overwrite) as making:
            making.create()
            ranks.gather(making.begun)
            shares, direct, gpus = fill(making.filling)
            making.collect()
            making.complete(strong, lambda k: _card(want, rules, weak, strong, job, making.tally, k), digest)
            if loader is not None:
                making.check(loader)
            warnings = [*dict.fromkeys((*job.notes, *gpus)), *making.tally.warnings(), *making.commit()]
        seconds = time.perf_counter() - began
        merged = _merged(job, making, ranks.world, shares, direct, (verify, check), seconds, warnings)
        try:
            ranks.gather(merged)
        except (RankError, KeyboardInterrupt):  # the output is in place all the same
            if ranks.restarts:  # its journal says so to those that are started again
                return merged
        return replace(merged, warnings=merged.warnings + tuple(making.forget()))


def _merged(
    job: Preview, making: Making, ranks: int, shares: dict[str, int], direct: bool, proofs: tuple[bool, bool],
    seconds: float, warnings: Sequence[str],
) -> Merged:  # fmt: skip
    """What a merge that is in place reports; proofs: whether it was verified, and whether it was checked."""
    plan, tally = job.plan, making.tally
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
        engine=job.crew[0].name,
        why=job.crew[0].why,
        workers=len(job.crew),
        ranks=ranks,
        shares=shares,
        direct=direct,
        verified=proofs[0],
        checked=proofs[1],
        resumed=making.filling.resumed,
        warnings=tuple(warnings),
    )


def _loader(aligned: Checkpoint) -> Any:
    """The class that --check loads outputs with. Raises UsageError."""
    from .load_check import model_class

    return model_class(aligned)


def _fill(
    filling: Filling, ranks: Alone, verify: bool, progress: Progress | None, cancel: threading.Event | None
) -> tuple[dict[str, int], bool, list[str]]:
    """Compute, sync and verify all ranks' parts.

    Returns bytes of output by engine, whether all was written with O_DIRECT, and what warnings say of GPUs that failed.
    """
    passes = 1 + verify
    filling.compute(_part(progress, 0, passes), cancel)
    found = ranks.gather((filling.shares, filling.direct))
    if verify:
        filling.verify(_part(progress, 1, passes), cancel)
    notes = [note for each in ranks.gather(list(filling.notes)) for note in each]
    shares = Counter[str]()
    for each, _ in found:
        shares.update(each)
    return dict(shares), all(direct for _, direct in found), list(dict.fromkeys(notes))


def _follow(
    weak: Checkpoint, strong: Checkpoint, job: Preview, identity: Mapping[str, Any], ranks: Alone, fill: Fill
) -> Merged:
    """The part of a rank other than 0, which makes the stagings, completes and commits them."""
    chunk, stops = ranks.gather(None)[0]
    folders = {k: staging_folder(path) for k, path in enumerate(job.outs) if path not in job.committed}
    source, tally = Source(weak, strong), Tally(len(job.outs))
    with closing(Journal(job.journalled, identity, ranks.rank)) as journal:
        journal.join(chunk)
        done: Done = {key: (stop, {}) for key, stop in stops.items()}
        filling = Filling(job.plan, source, job.crew, folders, journal, ranks, tally, chunk, done)
        with closing(filling):
            try:
                fill(filling)
            except BaseException:
                with suppress(CheckpointError, OutputError):  # what was written down before counts
                    filling.record()
                raise
    merged: Merged = ranks.gather(None)[0]
    return merged


def _agree(ranks: Alone, merge: Mapping[str, Any]) -> None:
    """Raise RankError where the ranks do not see the same merge."""
    own = json.loads(json.dumps(merge))
    for rank, other in enumerate(ranks.gather(own)):
        if other != own:
            differing = "; ".join(differences(other, own))
            raise RankError(f"ranks {rank} and {ranks.rank} do not see the same merge: for {rank}, {differing}")


def _card(
    want: Wanted, rules: Rules, sft: Checkpoint, aligned: Checkpoint, job: Preview, tally: Tally, k: int
) -> bytes:
    """README.md of one output."""
    from .model_card import card

    alpha, out = job.plan.alphas[k], job.outs[k]
    readme = aligned.files.get(CARD)
    text = card(
        sft=sft.origin or Origin(sft.name),
        aligned=aligned.origin or Origin(aligned.name),
        alpha=alpha,
        rules=rules.alpha_for,
        options={name: str(value) for name, value in rules.chosen().items()}
        | ({"--carry": " ".join(rules.carry)} if rules.carry else {}),
        command=_command(want, rules, sft, aligned, alpha),
        name=f"{aligned.name}-expo-{alpha_text(alpha)}",
        readme=None if readme is None else _text(readme),
        output=tally.output(k, out, alpha),
        relative_distance=tally.relative_distance,
        max_abs_difference=tally.max_abs_d,
        extrapolated=job.plan.extrapolated(k),
        copied=job.plan.copied(k),
        dropped=tuple(job.plan.dropped.items()),
        dtype=", ".join(sorted({step.dtype for step in job.plan.steps if step.dtype in ITEMSIZE})),
        tokenizer=has_tokenizer(job.plan.carried),
        code=any(name.endswith(".py") for name in job.plan.carried),
    )
    return text.encode()


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_CARD)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _command(want: Wanted, rules: Rules, sft: Checkpoint, aligned: Checkpoint, alpha: float) -> str:
    """What to type for an output, wherever it is to go: the same model has the same card."""
    words = ["python", "-m", "expo.fast", "--sft", _given(want.sft, sft), "--aligned", _given(want.aligned, aligned)]
    words += ["--alpha", alpha_text(alpha)]
    for pattern, value in rules.alpha_for.items():
        words += ["--alpha-for", f"{pattern}={alpha_text(value)}"]
    words += [word for option, value in rules.chosen().items() for word in (option, str(value))]
    words += [word for pattern in rules.carry for word in ("--carry", pattern)]
    return shlex.join(words)


def _given(name: StrPath, checkpoint: Checkpoint) -> str:
    """Return a hub id as the user gave it, and of a local path the last part: the rest is nobody else's business."""
    name = os.fspath(name)
    if name != checkpoint.path:
        return name
    return "@".join(filter(None, checkpoint.origin)) if checkpoint.origin else os.path.basename(os.path.abspath(name))


def _part(progress: Progress | None, before: int, passes: int) -> Progress:
    """Progress of one pass of several as progress of all of them: each counts for its share of the bytes."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress((before * total + done) // passes, total)

    return tell


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of each weight file its bytes, the time of its last change, and the digest of its header."""
    return {
        name: [file.size, file.reader.identity.modified, file.digest] for name, file in checkpoint.weight_files.items()
    }


def _identity(sft: Checkpoint, aligned: Checkpoint, plan: Plan, rules: Rules) -> dict[str, Any]:
    """What must be the same for a merge to go on with another's bytes."""
    from .._version import __version__

    return {
        "version": __version__,
        "--alpha": plan.alphas,
        **rules.options(),
        "--alpha-for": [[pattern, float(alpha)] for pattern, alpha in rules.alpha_for.items()],  # the last match wins
        "tie_word_embeddings of sft and aligned": [tie_flag(each.config) for each in (sft, aligned)],
        "sft": _fingerprint(sft),
        "aligned": _fingerprint(aligned),
        "the adapter's config": aligned.adapter.config if aligned.adapter else None,
        "the files to write": {
            shard.name: [shard.size, hashlib.sha256(shard.header).hexdigest()] for shard in plan.shards
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Preview:
    """What merge() would do, and with what.

    free: bytes that may still be written to the output's disk, or to the fullest of several. notes: what to know of the
    pair. error: what merge() would raise, or None. committed: outputs that an interrupted merge has put in place.
    """

    plan: Plan
    outs: tuple[str, ...]
    committed: frozenset[str]
    crew: tuple[Engine, ...]
    free: int
    notes: tuple[str, ...]
    error: ExpoError | None

    @property
    def journalled(self) -> list[str]:
        """The staging folders of outputs that have a journal, or will have."""
        folders = [(path, staging_folder(path)) for path in self.outs]
        return [folder for path, folder in folders if path not in self.committed or has_journal(folder)]

    @property
    def memory(self) -> int:
        """Bytes of memory it takes: buffers, the pages mapped at a time, and the interpreter."""
        outputs, size = len(self.outs), chunk_size(len(self.crew), len(self.outs))
        slots = sum(1 if engine.gpu is None else 1 + RING_SLOTS for engine in self.crew)
        on_gpu = any(engine.name == "triton" for engine in self.crew)
        converted = any(not step.plain for step in self.plan.steps)
        pairs = sorted(step.delta.nbytes for step in self.plan.steps if step.delta is not None)
        factors = 2 * sum(pairs[-FACTORS:])  # as fp32
        own = slots * size * (outputs + 2) + len(self.crew) * converted * CONVERTING
        return BASE_MEMORY + on_gpu * TORCH_MEMORY + own + factors


def preview(
    sft: StrPath | None = None,
    aligned: StrPath | None = None,
    alpha: float | Iterable[float] | None = None,
    out: StrPath | None = None,
    *,
    recipe: str | None = None,
    alpha_for: Mapping[str, float] | None = None,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    carry: Sequence[str] = (),
    engine: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = True,
) -> Preview:
    """The plan of a merge with the same arguments, from headers alone; writes nothing but the hub's cache.

    Raises what merge() raises where there is no plan at all: UsageError, EngineError, CheckpointError, and OutputError
    for an `out` that is a mount point.
    """
    want = wanted(sft, aligned, alpha, recipe)
    rules = Rules(alpha_for or {}, on_unpaired, on_mismatch, dtype, max_shard_size, carry)
    prepared = _prepare(want, out, rules, engine, device, overwrite, resume, quiet, Alone(), headers_only=True)
    with prepared as (_, _, job):
        return job


@contextmanager
def _prepare(
    want: Wanted,
    out: StrPath | None,
    rules: Rules,
    engine: str,
    device: str,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    ranks: Alone,
    headers_only: bool = False,
) -> Iterator[tuple[Checkpoint, Checkpoint, Preview]]:
    """Open both checkpoints, plan, and find out whether the plan can be carried out."""
    if ranks.world > 1 and (device == "cuda" or (engine == "triton" and device == "auto")):
        device = f"cuda:{ranks.local_rank}"
    workers = crew(engine, device, ranks.local_world)
    check_arguments(want.alphas, *rules)  # before anything is downloaded
    check_names(out, want.alphas)
    if out is not None:
        for path in fill_in(out, want.alphas):
            refuse_mount_point(path, os.path.isfile(want.aligned))
    with open_inputs(want.sft, want.aligned, quiet, headers_only, rules.carry) as (weak, strong):
        code = find_code(strong.files)
        plan = make_plan(weak, strong, want.alphas, *rules, code)
        found = (tokens.difference(weak, strong), tokens.missing(weak, strong), missing_modules(plan.left_out))
        notes = (*plan.notes, *filter(None, found), *code.notes, *filter(None, [workers[0].note]))
        outs = output_paths(out, strong, want.alphas)
        committed = _committed(outs) if resume else frozenset()
        error: ExpoError | None = None
        try:
            plan.check()
            missing = [path for path in outs if path not in committed]
            check_places(missing, plan, (weak, strong))
            for path in missing:
                check_free(path, strong.folder is None, overwrite)
        except (PlanError, OutputError) as caught:
            error = caught
        yield weak, strong, Preview(plan, outs, committed, workers, min(map(free_bytes, outs)), notes, error)


def _committed(outs: Sequence[str]) -> frozenset[str]:
    """Outputs that an interrupted merge has put in place: their journals are still beside them.

    Journals go when all outputs are in place: where one is left and nothing is staged, all are.
    """
    unstaged = [out for out in outs if os.path.exists(out) and not os.path.isdir(staging_folder(out))]
    done = frozenset(out for out in unstaged if has_journal(staging_folder(out)))
    return frozenset(outs) if done and len(unstaged) == len(outs) else done


def check_names(out: StrPath | None, alphas: Sequence[float]) -> None:
    """Raise UsageError where `out` names nothing, or several alphas would share one output."""
    if out is None:
        return
    template = os.fspath(out)
    if not template:
        raise UsageError("--out is empty: name a folder or a file")
    if len(set(alphas)) > 1 and "{alpha}" not in template:
        raise UsageError(f"{len(alphas)} alphas need an output each: put {{alpha}} into --out, got {template!r}")


def output_paths(out: StrPath | None, aligned: Checkpoint, alphas: Sequence[float]) -> tuple[str, ...]:
    """One path for each alpha."""
    suffix = ".safetensors" if aligned.folder is None else ""
    return fill_in(f"{aligned.name}-expo-{{alpha}}{suffix}" if out is None else out, alphas)


def fill_in(template: StrPath, alphas: Sequence[float]) -> tuple[str, ...]:
    """The template's path for each alpha."""
    return tuple(os.fspath(template).replace("{alpha}", alpha_text(alpha)) for alpha in alphas)


def alpha_text(alpha: float) -> str:
    """The shortest text that means this alpha: 0.3, 1, 1e-05."""
    return f"{alpha:g}" if float(f"{alpha:g}") == alpha else repr(alpha)


def check_places(outs: Sequence[str], plan: Plan, inputs: Sequence[Checkpoint]) -> None:
    """Raise OutputError where one of these outputs would touch an input, or they would not fit on their disk."""
    for out in outs:
        place = os.path.realpath(out)
        for checkpoint in inputs:
            # A shard may be a link to a place outside the checkpoint's folder.
            for path in (checkpoint.path, *(file.path for file in checkpoint.weight_files.values())):
                source = os.path.realpath(path)
                if os.path.commonpath((place, source)) in (place, source):
                    raise OutputError(f"{out} is, contains or lies inside the input {path}; choose another --out")
    disks: dict[int, list[str]] = {}
    for out in outs:
        disks.setdefault(os.stat(_standing(out)).st_dev, []).append(out)
    for here in disks.values():
        needed, free = plan.output_bytes // len(plan.alphas) * len(here), free_bytes(here[0])
        # What an interrupted merge has left is gone on with or removed; `Staging` refuses otherwise, and names it.
        if free + sum(map(held, here)) < needed:
            raise OutputError(
                f"{here[0]}: {size_text(needed)} are needed, but {size_text(free)} are free; free some space or choose "
                "another --out"
            )


def free_bytes(out: str) -> int:
    """Bytes that may still be written on the disk that `out` will be on."""
    return shutil.disk_usage(_standing(out)).free


def _standing(out: str) -> str:
    """The folder that an output's name, or the folders to be made for it, will be in."""
    folder = os.path.dirname(os.path.realpath(out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder
