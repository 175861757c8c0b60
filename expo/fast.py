"""Run a merge from the command line: python -m expo.fast --sft A --aligned B --alpha 0.3 [--out C]

This module makes options from arguments, runs the merge, and prints its summary. Results go to stdout; progress and
messages go to stderr. Exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be merged; 4 the output could not be
written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cli import Bar, add_base, as_json, run, show, warn, with_options
from .dtypes import OUTPUT_DTYPES
from .errors import UsageError
from .options import ENGINES, ON_MISMATCH, ON_UNPAIRED, MergeOptions
from .text import size_text

# The functions below import the modules that they need: --help then takes a third of the time.
if TYPE_CHECKING:
    from .inputs.resolve import PairRequest
    from .merging.job import MergeJob
    from .merging.result import Merged

SHOWN = 8  # tensors or files that each list of the summary names
EPILOG = """\
out = aligned + alpha * (aligned - sft), in fp32, rounded once to aligned's dtype (ExPO, arXiv 2404.16792).
exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be merged; 4 the output could not be written; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    """List the recipes, print the plan, or merge, and return the exit code."""
    if options.list_recipes:
        return _list_recipes(options)
    return _plan(options) if options.plan else _merge(options)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m expo.fast",
        description="Extrapolate two checkpoints of a language model to a third, which may be better aligned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Argparse's own pattern takes -0.1 as a number but -1e-3 as an option; this pattern takes both as numbers.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    _add_inputs(parser.add_argument)
    _add_content(parser.add_argument)
    _add_execution(parser.add_argument)
    parser.add_argument("--version", action="version", version=f"expo {__version__}")
    return parser


def _add_inputs(add: Callable[..., Any]) -> None:
    """Add the options that name the inputs, the alphas and the output."""
    add(
        "--sft", metavar="A",
        help="the checkpoint before alignment: a folder, a .safetensors or .bin file, org/name[@revision], or a LoRA "
        "adapter for M",
    )  # fmt: skip
    add(
        "--aligned",
        metavar="B",
        help="the checkpoint that was trained from A, in the same forms, or a LoRA adapter for A",
    )
    add_base(add)
    add("--alpha", nargs="+", type=float, help="how far the output goes past B; one output is made for each alpha")
    add(
        "--recipe",
        metavar="NAME",
        help="a public pair, which gives --sft, --aligned and its published --alpha if they are left out",
    )
    add(
        "--list-recipes",
        action="store_true",
        help="print the public pairs with their published alphas and scores, and stop",
    )
    add("--out", metavar="C", help="the output; it contains {alpha} for several alphas (default: ./<B>-expo-<alpha>)")


def _add_content(add: Callable[..., Any]) -> None:
    """Add the options that decide the content of an output."""
    add(
        "--alpha-for", action="append", default=[], metavar="REGEX=FLOAT",
        help="use this alpha for tensors whose name matches; repeatable, the last match counts, 0 keeps B's tensor",
    )  # fmt: skip
    add(
        "--on-unpaired", choices=ON_UNPAIRED, default="error",
        help="if a tensor is in one input alone: refuse the merge, or keep B's tensors and drop A's",
    )  # fmt: skip
    add(
        "--on-mismatch", choices=ON_MISMATCH, default="error",
        help="if a tensor has two shapes: refuse the merge, extrapolate the rows that both have, or keep B's tensor",
    )  # fmt: skip
    add("--dtype", choices=OUTPUT_DTYPES, help="write the output in this dtype, rounded once (default: B's dtypes)")
    add("--max-shard-size", metavar="SIZE", help="the largest size of a file, such as 5GB (default: B's own files)")
    add(
        "--carry", action="append", default=[], metavar="PATTERN",
        help="copy further files of B's folder into the output, such as 'docs/*'; repeatable",
    )  # fmt: skip
    add(
        "--aligned-config", metavar="FOLDER",
        help="the folder with config.json and tokenizer, if B is the parts that a training's processes saved",
    )  # fmt: skip


def _add_execution(add: Callable[..., Any]) -> None:
    """Add the options that decide how the output is made, and the output of the command."""
    add("--engine", choices=ENGINES, default="auto", help="auto: compiled CPU code, else NumPy; triton needs a GPU")
    add(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, or cuda[:index], which adds a GPU to the workers"
    )
    add("--plan", action="store_true", help="read headers only, print what happens to every tensor, write nothing")
    add("--json", action="store_true", help="print the result, or the plan, as one JSON object")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--resume", action="store_true", help="continue an interrupted merge, if there is one")
    add("--digest", action="store_true", help="write SHA256SUMS too, which sha256sum -c checks")
    add("--verify", action="store_true", help="read the output back and compare it with a second computation")
    add(
        "--check",
        action="store_true",
        help="let transformers load the output's headers before the output is put in place",
    )
    add("--quiet", action="store_true", help="print no progress and no summary")


def _rules(texts: Sequence[str]) -> dict[str, float]:
    """Return the alphas of `--alpha-for`, by their regular expressions. Raises UsageError."""
    rules: dict[str, float] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            alpha = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--alpha-for takes REGEX=FLOAT, got {text!r}")
        rules.pop(pattern, None)  # the last match counts, so a repeated pattern moves to its last place
        rules[pattern] = alpha
    return rules


def _request(options: argparse.Namespace) -> tuple[PairRequest, MergeOptions]:
    """Return the pair to merge, and the options. Raises UsageError."""
    from .inputs.resolve import complete_request

    pair = complete_request(
        options.sft, options.aligned, options.alpha, options.recipe, options.base, options.adapter_over
    )
    given = vars(options) | {"alphas": pair.alphas, "alpha_for": _rules(options.alpha_for)}
    return pair, MergeOptions(**{each.name: given[each.name] for each in fields(MergeOptions)})


def _list_recipes(options: argparse.Namespace) -> int:
    """Print the public pairs."""
    from .inputs import recipes

    show(recipes.as_json() if options.json else recipes.table())
    return 0


def _merge(options: argparse.Namespace) -> int:
    """Merge, and print the summary on rank 0."""
    from .merging.launcher import join
    from .merging.merge import merge_pair

    with join() as ranks, ranks.together():
        bar = None if options.quiet or ranks.rank else Bar()
        pair, chosen = _request(options)
        chosen = replace(chosen, resume=chosen.resume or ranks.restarts)  # a launcher restarts with the same arguments
        try:
            merged = merge_pair(pair, options.out, chosen, ranks, bar)
        finally:
            if bar is not None:
                bar.close()
    if ranks.rank:
        return 0
    warn(merged.warnings)
    if options.json:
        show(as_json(asdict(merged)))
    elif not options.quiet:
        show("\n".join(_summary(merged)))
    return 0


def _summary(merged: Merged) -> Iterator[str]:
    """Yield the lines of a merge's summary."""
    moved = merged.bytes_read + merged.bytes_written
    yield (
        f"{size_text(merged.bytes_read)} read, {size_text(merged.bytes_written)} written in {merged.seconds:.2f} s, "
        f"{size_text(moved / merged.seconds)}/s moved"
    )
    if merged.resumed:
        yield f"  resumed  {size_text(merged.resumed)} of the output were already done"
    yield f"  tensors  {merged.extrapolated} extrapolated, {len(merged.copied)} copied, {len(merged.dropped)} dropped"
    yield from _some([f"copied {name}: {reason}" for name, reason in merged.copied])
    yield from _some([f"extrapolated {name}: {reason}" for name, reason in merged.noted])
    yield from _some([f"dropped {name}: {reason}" for name, reason in merged.dropped])
    yield from _some([f"left out {name}: {reason}" for name, reason in merged.left_out])
    written = "past the page cache" if merged.direct else "through the page cache"
    parts = [f"{name} {done / merged.bytes_written:.0%}" for name, done in merged.shares.items()]
    shares = f"; {', '.join(parts)} of the bytes" if len(parts) > 1 else ""
    each = f" on each of {merged.ranks} ranks" if merged.ranks > 1 else ""
    yield f"  engine   {merged.engine}, {merged.workers} workers{each} ({merged.why}){shares}; written {written}"
    for output in merged.outputs:
        yield (
            f"  alpha {output.alpha:g}  {output.changed:.1%} of elements changed, |change| / |aligned| "
            f"{output.relative_change:.3g}, {output.non_finite} non-finite"
        )
        yield f"           -> {output.path}" + " (verified)" * merged.verified + " (checked)" * merged.checked


def _some(lines: Sequence[str]) -> Iterator[str]:
    """Yield the first SHOWN lines, indented, and a line with the number of the others."""
    shown = [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more; --plan lists them all"] if len(lines) > SHOWN else [])]
    yield from (f"           {line}" for line in shown)


def _plan(options: argparse.Namespace) -> int:
    """Print the plan on rank 0, and raise its error if the merge cannot be done."""
    from .merging.launcher import launched_rank
    from .merging.merge import preview

    if launched_rank():
        return 0  # rank 0 prints the plan
    pair, chosen = _request(options)
    job = preview(pair, options.out, chosen)
    if options.json:
        show(as_json(_plan_object(job)))
    elif not options.quiet:
        show("\n".join(_plan_text(job)))
    if job.error is not None:
        raise job.error
    return 0


def _plan_text(job: MergeJob) -> Iterator[str]:
    """Yield the lines of a printed plan."""
    from .checkpoints.safetensors_header import describe
    from .planning.steps import Action

    plan, engine = job.plan, job.engines[0]
    width = max(len(step.label) for step in plan.steps)
    for step in plan.steps:
        alphas = "alpha " + " ".join(f"{alpha:g}" for alpha in step.alphas)
        detail = ", ".join([alphas] * (step.action is Action.EXTRAPOLATE) + [step.reason] * bool(step.reason))
        to = f" to {step.dtype}" if step.dtype != step.aligned.dtype else ""
        what = f"{step.action.value:11}  {step.label:{width}}  {describe(step.aligned) + to:22}  {detail}"
        yield f"{what}  {size_text(step.nbytes)}"
    for name, reason in plan.dropped.items():
        yield f"{'drop':11}  {name:{width}}  {reason}"
    for name in plan.rewritten:
        yield f"{'rewrite':11}  {name}"
    for name in plan.carried:
        yield f"{'carry':11}  {name}"
    for name, reason in plan.left_out:
        yield f"{'leave out':11}  {name}: {reason}"
    moved = f"reads {size_text(plan.input_bytes)}, writes {size_text(plan.output_bytes)}"
    yield f"{moved}; {size_text(job.free)} are free"
    yield f"memory about {size_text(job.memory)}; engine {engine.name}, {len(job.engines)} workers ({engine.why})"
    if (base := _describe_base(job)) is not None:
        yield base
    for note in job.notes:
        yield f"note: {with_options(note)}"
    for out in job.outs:
        yield f"-> {out}"


def _describe_base(job: MergeJob) -> str | None:
    """Return the sentence about the base of two adapters; None for all other inputs."""
    base = job.aligned.common_base
    return None if base is None else f"base {base.name}: {with_options(base.sentence)}"


def _plan_object(job: MergeJob) -> dict[str, Any]:
    """Return the object that --plan --json prints."""
    plan, engine = job.plan, job.engines[0]
    files = {step.name: shard.name for shard in plan.shards for step, _ in shard.steps}
    return {
        "steps": [
            {
                "name": step.name, "action": step.action.value, "reason": step.reason, "alphas": step.alphas,
                "dtype": step.dtype, "shape": step.shape, "rows": step.rows, "bytes": step.nbytes,
                "file": files[step.name],
            }
            for step in plan.steps
        ],
        "dropped": plan.dropped, "rewritten": list(plan.rewritten), "carried": plan.carried,
        "left_out": dict(plan.left_out), "outputs": job.outs, "bytes_read": plan.input_bytes,
        "bytes_written": plan.output_bytes, "bytes_free": job.free, "memory": job.memory,
        "base": _describe_base(job),
        "notes": list(map(with_options, job.notes)),
        "engine": engine.name, "why": engine.why, "workers": len(job.engines),
        "problems": list(map(with_options, [str(job.error)] if job.error and not plan.problems else plan.problems)),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
