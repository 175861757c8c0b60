"""The command line: python -m expo.search --sft A --aligned B --prompts P.jsonl --reward R --out DIR

Arguments to search_alpha() to a table, and nothing else: results on stdout, progress and messages on stderr.
Exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be read or merged; 4 something could not be written;
130 interrupted: the replies are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..cli import run, show, warn
from ..errors import OutputError, UsageError
from ..inputs.resolve import StrPath, complete_request
from ..options import ON_MISMATCH, ON_UNPAIRED
from .probing import BUDGET
from .prompts import read_prompts

if TYPE_CHECKING:
    from .searching import SearchResult

GRID = "0.1:0.5:0.1"  # the paper's, for public models
MOST = 1000  # alphas of a range
EPILOG = """\
Replies are sampled with the paper's settings: temperature 0.7, top-p 0.9, top-k 50, presence and frequency penalty 0.1.
DIR gets replies.jsonl, summary.json and plot.png. The same command again goes on where it was stopped; other --alphas
add to what is there; --batch-size, --device and --keep may differ, which changes replies by rounding only.
exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be read or merged; 4 something could not be written;
130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options), f"replies are kept in {options.out}; the same command goes on")


def _run(options: argparse.Namespace) -> int:
    pair = complete_request(options.sft, options.aligned, 1.0, options.recipe)
    result = _search(options, pair.sft, pair.aligned)
    warn(result.warnings)
    show("\n".join([*_table(result), *result.verdict.splitlines(), f"-> {result.path}"]))
    if result.best == 0:
        show("nothing to merge: aligned itself is the best")
    elif options.merge is None:
        show(f"merge: {result.command}")
    else:
        _merge(options, pair.sft, pair.aligned, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expo.search",
        description="Find the alpha whose replies a reward model likes best, with no merge on the disk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sft", metavar="A", help="the weaker checkpoint: a folder, a file, or org/name[@revision]")
    add("--aligned", metavar="B", help="the checkpoint trained from it: a folder or org/name[@revision]")
    add("--recipe", metavar="NAME", help="a published pair: gives --sft and --aligned where they are left out")
    add("--prompts", required=True, metavar="P", help=".jsonl or .json with prompt or instruction, or lines of text")
    add("--reward", required=True, metavar="R", help="a reward model (folder or hub id), or module:function")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--alphas", metavar="LIST", help=f"0.1,0.3 or first:last:step (default: {GRID}); 0 is always in")
    which.add_argument("--auto", action="store_true", help="wide probes, then a shrinking interval around the best")
    add("--budget", type=int, default=BUDGET, metavar="N", help="alphas that --auto may try (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="folder of the results, which a stopped search goes on with")
    add("--merge", metavar="OUT", help="make the merge at the best alpha there, and check that it is what was judged")
    _add_generation(add)
    add("--version", action="version", version=f"expo {__version__}")
    return parser


def _add_generation(add: Callable[..., Any]) -> None:
    add("--limit", type=int, metavar="N", help="the first N prompts only")
    add("--batch-size", type=int, default=16, metavar="N", help="replies at a time (default: %(default)s)")
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="of a reply (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, or cuda[:index]")
    add(
        "--keep",
        choices=("device", "host", "disk"),
        default="device",
        help="where both models' original weights are kept",
    )
    add("--on-unpaired", choices=ON_UNPAIRED, default="error", help="as for expo.fast")
    add("--on-mismatch", choices=ON_MISMATCH, default="error", help="as for expo.fast")
    add("--alpacaeval", action="store_true", help="also write replies as AlpacaEval reads them, a file for each alpha")
    add("--trust-remote-code", action="store_true", help="run code that comes with the models")
    add("--quiet", action="store_true", help="no progress, no messages but warnings")


def parse_alphas(text: str) -> list[float]:
    """0.1,0.3 or first:last:step, last included, or both: 0.1:0.5:0.1,1. Raises UsageError."""
    alphas: list[float] = []
    for part in text.split(","):
        try:
            numbers = [Decimal(number.strip()) for number in part.split(":")]
        except InvalidOperation:
            numbers = []
        if len(numbers) not in (1, 3) or not all(number.is_finite() for number in numbers):
            raise UsageError(f"--alphas takes 0.1,0.3 or first:last:step, got {text!r}")
        first, last, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], Decimal(1))
        count = int((last - first) / step) + 1 if step and (last - first) / step >= 0 else 0
        if not 1 <= count <= MOST:
            raise UsageError(f"--alphas {part}: a range of 1 to {MOST} alphas is needed, first:last:step")
        alphas += [float(first + number * step) for number in range(count)]
    return alphas


def _search(options: argparse.Namespace, sft: StrPath, aligned: StrPath) -> SearchResult:
    alphas: list[float] | str = "auto" if options.auto else parse_alphas(options.alphas or GRID)
    prompts = read_prompts(options.prompts, options.limit)
    if options.merge is not None and os.path.lexists(options.merge):  # rather now than after hours
        raise OutputError(f"--merge {options.merge}: it exists already; choose another name")
    _hush(options.quiet)
    from .searching import search_alpha

    return search_alpha(
        sft, aligned, prompts, options.reward, alphas, options.out,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, seed=options.seed, device=options.device,
        keep=options.keep, budget=options.budget, on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch,
        trust_remote_code=options.trust_remote_code, alpacaeval=options.alpacaeval, digest=options.merge is not None,
        quiet=options.quiet,
    )  # fmt: skip


def _hush(quiet: bool) -> None:
    """Keep what libraries print to what a reader needs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    log: Any = transformers.logging
    log.set_verbosity_error()
    if quiet:
        log.disable_progress_bar()


def _table(result: SearchResult) -> list[str]:
    """A line for each alpha; * marks the best, = those that are not distinguishable from it, ! a warning."""
    cells = [("", "alpha", "reward", "+-", "gain over 0", "95% interval", "tokens", "unfinished", "repeated")]
    for row in result.rows:
        mark = "*" if row.alpha == result.best else "=" if row.alpha in result.equals else " "
        gain = (f"{row.gain:+.3g}", f"{row.low:+.3g} to {row.high:+.3g}") if row.alpha else ("", "")
        reward = (f"{row.alpha:g}", f"{row.reward:.4g}", f"{row.error:.2g}")
        shares = (f"{row.unfinished:.1%}", f"{row.repetition:.1%}")
        cells.append((mark + "!" * bool(row.warnings), *reward, *gain, f"{row.tokens:.0f}", *shares))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [*lines, "* best  = not distinguishable from it  ! signs of too large an alpha"]


def _merge(options: argparse.Namespace, sft: StrPath, aligned: StrPath, result: SearchResult) -> None:
    """Merge at the best alpha, and load the merge to compare it with the model that was judged."""
    from ..merging.merge import merge
    from .judging import check_merge

    merged = merge(
        sft, aligned, result.best, options.merge,
        on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch, resume=True,
    )  # fmt: skip
    warn(merged.warnings)
    path = merged.outputs[0].path
    show(f"merged at alpha {result.best:g} -> {path}")
    if not options.quiet:
        print(f"expo: loading {path}, to compare it with the model that was judged", file=sys.stderr, flush=True)
    check_merge(path, result.digests, options.trust_remote_code)
    show(f"checked: all {len(result.digests)} weights are those that were judged, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
