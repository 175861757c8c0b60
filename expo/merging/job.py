"""One merge as a value: its inputs, options, plan, output paths, engines and identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .._version import __version__
from ..checkpoints import tokenizer
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.custom_code import find_code
from ..checkpoints.files import CONFIG
from ..checkpoints.model_parts import tie_flag
from ..checkpoints.sidecars import find_missing_modules
from ..errors import ExpoError, OutputError, PlanError
from ..execution.engines import Engine, engines_for
from ..execution.lanes import ring_slots
from ..execution.make_lanes import compile_kernels
from ..execution.tensor_source import CONVERSION_BYTES, MOST_FACTORS, TensorSource
from ..execution.worker_pool import chunk_size
from ..inputs.resolve import PairRequest, StrPath, open_inputs
from ..options import MergeOptions
from ..output.journal import has_journal
from ..output.mounts import refuse_mount_point
from ..output.staging import check_free, staging_folder
from ..planning.matching import match_tensors
from ..planning.plan import Plan, plan_output
from .output_paths import check_places, check_template, fill_in, free_bytes, output_paths
from .process_group import SingleProcess

BASE_MEMORY = 25_000_000  # bytes of the interpreter with the modules that a CPU merge imports
TORCH_MEMORY = 500_000_000  # bytes of the modules torch and triton, without the memory of a GPU's driver


@dataclass(frozen=True)
class MergeJob:
    """One merge, before its first byte is written.

    Attributes:
        pair: The two inputs as the user named them.
        options: The options of the merge.
        sft: The opened checkpoint sft.
        aligned: The opened checkpoint aligned.
        plan: The plan of all outputs.
        outs: One path for each alpha.
        committed: The paths of `outs` that an interrupted merge has put in place.
        engines: One engine for each worker of this process.
        ranks: The processes that make the merge together.
        notes: Sentences that `merge` returns as warnings.
        error: The error that `merge` raises for this job; None if the job can be done.
    """

    pair: PairRequest
    options: MergeOptions
    sft: Checkpoint
    aligned: Checkpoint
    plan: Plan
    outs: tuple[str, ...]
    committed: frozenset[str]
    engines: tuple[Engine, ...]
    ranks: SingleProcess
    notes: tuple[str, ...]
    error: ExpoError | None

    @cached_property
    def source(self) -> TensorSource:
        """The bytes of both inputs."""
        return TensorSource(self.sft, self.aligned)

    @property
    def staged(self) -> dict[int, str]:
        """The staging folders of the outputs that are still to be made, by the output's number."""
        return {k: staging_folder(path) for k, path in enumerate(self.outs) if path not in self.committed}

    @property
    def journalled(self) -> list[str]:
        """The staging folders of the outputs that have a journal or will get one."""
        folders = [(path, staging_folder(path)) for path in self.outs]
        return [folder for path, folder in folders if path not in self.committed or has_journal(folder)]

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk in bytes."""
        return chunk_size(len(self.engines), len(self.outs))

    @property
    def free(self) -> int:
        """Free bytes on the disk of the outputs; the smallest number if they go to several disks."""
        return min(map(free_bytes, self.outs))

    @property
    def memory(self) -> int:
        """Bytes of memory that the merge takes: buffers, the pages that are mapped at a time, and the interpreter."""
        slots = sum(1 + ring_slots(self.engines) if engine.streams else 1 for engine in self.engines)
        on_gpu = any(engine.name == "triton" for engine in self.engines)
        converts = any(not step.plain for step in self.plan.steps)
        deltas = sorted(each.nbytes for each in {each for step in self.plan.steps for each in step.all_deltas})
        factors = 2 * sum(deltas[-MOST_FACTORS:])  # in fp32
        buffers = slots * self.chunk_bytes * (len(self.outs) + 2) + len(self.engines) * converts * CONVERSION_BYTES
        # Elements that are spread over a file are read for a whole chunk at once, in up to twice the output's bytes.
        spread = sum(checkpoint.is_scattered for checkpoint in (self.sft, self.aligned))
        buffers += len(self.engines) * spread * 2 * self.chunk_bytes
        return BASE_MEMORY + on_gpu * TORCH_MEMORY + buffers + factors

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The values that two merges must share so that one can continue the other, as a JSON object."""
        rules = [[pattern, float(alpha)] for pattern, alpha in self.options.alpha_for.items()]
        return {
            "version": __version__,
            "--alpha": self.plan.alphas,
            **self.options.content(),
            "--alpha-for": rules,  # a list, because the order of the rules counts
            "tie_word_embeddings of sft and aligned": [tie_flag(each.config) for each in (self.sft, self.aligned)],
            "sft": _fingerprint(self.sft),
            "aligned": _fingerprint(self.aligned),
            "the adapters' configs": [each.config for side in (self.sft, self.aligned) for each in side.adapters],
            "the place of aligned's adapter": base.adapter_over if (base := self.aligned.common_base) else None,
            "the files to write": {
                shard.name: [shard.size, hashlib.sha256(shard.header).hexdigest()] for shard in self.plan.shards
            },
        }


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return each weight file's size in bytes, the time of its last change, and the digest of its header."""
    return {
        name: [file.size, file.reader.identity.modified, file.digest] for name, file in checkpoint.weight_files.items()
    }


@contextmanager
def open_job(
    pair: PairRequest, out: StrPath | None, options: MergeOptions, ranks: SingleProcess, headers_only: bool = False
) -> Iterator[MergeJob]:
    """Open both checkpoints, make the plan, and yield the job, with an error if the plan cannot be carried out.

    Args:
        pair: The two inputs as the user named them.
        out: The template of the outputs' paths; None for the default.
        options: The options of the merge, with its alphas.
        ranks: The processes that make the merge together.
        headers_only: True to download only the headers of weight files that are on the hub.

    Raises:
        ExpoError: There is no plan at all; see `preview` in merge.py.
    """
    assert options.alphas is not None
    engines = engines_for(options.engine, _device_of_rank(options, ranks), ranks.local_world)
    check_template(out, options.alphas)
    if out is not None:
        for path in fill_in(out, options.alphas):
            refuse_mount_point(path, os.path.isfile(pair.aligned))
    inputs = open_inputs(
        pair.sft, pair.aligned, options.quiet, headers_only, options.carry, pair.base, pair.adapter_over,
        options.aligned_config,
    )  # fmt: skip
    with inputs as (sft, aligned):
        code = find_code(aligned.files)
        plan = plan_output(aligned, match_tensors(sft, aligned, options), options, code)
        input_notes = (
            tokenizer.compare(sft, aligned),
            tokenizer.find_missing(sft, aligned),
            find_missing_modules(plan.left_out),
        )
        outs = output_paths(out, aligned, options.alphas)
        committed = _committed(outs) if options.resume else frozenset()
        error = _find_error(plan, [path for path in outs if path not in committed], (sft, aligned), options.overwrite)
        engines = engines if error else compile_kernels(engines, plan)
        notes = (*plan.notes, *filter(None, input_notes), *code.notes, *filter(None, [engines[0].note]))
        yield MergeJob(pair, options, sft, aligned, plan, outs, committed, engines, ranks, notes, error)


def _device_of_rank(options: MergeOptions, ranks: SingleProcess) -> str:
    """Return the device that this rank computes on, which has an index if several ranks use GPUs.

    A launcher may let each rank see all GPUs of the host or only some of them (CUDA_VISIBLE_DEVICES), so the index is
    the local rank modulo the number of GPUs that this rank sees.
    """
    device = options.device
    if ranks.world > 1 and (device == "cuda" or (options.engine == "triton" and device == "auto")):
        import torch

        return f"cuda:{ranks.local_rank % max(torch.cuda.device_count(), 1)}"
    return device


def _find_error(
    plan: Plan, missing: list[str], inputs: tuple[Checkpoint, Checkpoint], overwrite: bool
) -> ExpoError | None:
    """Return the error that prevents the merge; None if the plan can be carried out.

    Args:
        plan: The plan of all outputs.
        missing: The paths of the outputs that are still to be made.
        inputs: sft and aligned.
        overwrite: True if outputs that exist are to be replaced.
    """
    try:
        plan.check()
        _check_config(inputs[1])
        check_places(missing, plan.output_bytes // len(plan.alphas), inputs)
        for path in missing:
            check_free(path, inputs[1].folder is None, overwrite)
    except (PlanError, OutputError) as error:
        return error
    return None


def _check_config(aligned: Checkpoint) -> None:
    """Raise PlanError if aligned is in parts and has no config, without which nothing loads the output."""
    if aligned.in_parts and CONFIG not in aligned.files:
        raise PlanError(
            f"aligned {aligned.path} has the parts that a training's processes saved, and no folder beside it has a "
            f"{CONFIG}: name the folder with {CONFIG} and tokenizer by `aligned_config`"
        )


def _committed(outs: tuple[str, ...]) -> frozenset[str]:
    """Return the outputs that an interrupted merge has put in place, which are those with a journal beside them.

    A merge removes its journals only after it has put all outputs in place. So all outputs are in place if at least one
    journal is left, every output exists, and no output has a staging folder.
    """
    unstaged = [out for out in outs if os.path.exists(out) and not os.path.isdir(staging_folder(out))]
    committed = frozenset(out for out in unstaged if has_journal(staging_folder(out)))
    return frozenset(outs) if committed and len(unstaged) == len(outs) else committed
