"""The command line: python -m expo.search --sft A --aligned B --prompts P.jsonl --reward R --out DIR

This module turns arguments into a call of search_alpha(), and the result into a table. Results go to stdout, and
progress and messages to stderr. Exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be read or merged;
4 something could not be written; 130 interrupted: the replies are kept, and the same command continues the search.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..cli import print_message, run, show, warn
from ..errors import OutputError, UsageError
from ..inputs.resolve import StrPath, complete_request
from ..options import ON_MISMATCH, ON_UNPAIRED
from .probing import BUDGET
from .prompts import read_prompts

if TYPE_CHECKING:
    from .results import SearchResult

GRID = "0.1:0.5:0.1"  # the paper's alphas for public models
MOST_ALPHAS = 1000  # in one range
EPILOG = """\
Replies are sampled with the paper's settings: temperature 0.7, top-p 0.9, top-k 50, presence and frequency penalty 0.1.
The search writes replies.jsonl, summary.json and plot.png to DIR. The same command continues a search that was stopped.
Other --alphas add to the results in DIR. --batch-size, --device and --keep may differ: they change replies by rounding
only.
exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be read or merged; 4 something could not be written;
130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options), f"the replies are kept in {options.out}; the same command continues the search")


def _run(options: argparse.Namespace) -> int:
    """Search, print the result, and merge if the user asks for it."""
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
        description="Find the alpha whose replies a reward scores best, without writing a merge for each alpha.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sft", metavar="A", help="the sft checkpoint: a folder, a file, or org/name[@revision]")
    add("--aligned", metavar="B", help="the checkpoint that was trained from sft: a folder or org/name[@revision]")
    add("--recipe", metavar="NAME", help="a public pair, which gives --sft and --aligned if they are left out")
    add("--prompts", required=True, metavar="P", help=".jsonl or .json with prompt or instruction, or lines of text")
    add("--reward", required=True, metavar="R", help="a reward model (a folder or a hub id), or module:function")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--alphas", metavar="LIST", help=f"0.1,0.3 or first:last:step (default: {GRID}); 0 always takes part"
    )
    which.add_argument(
        "--auto", action="store_true", help="try ever larger alphas, then divide the interval around the best one"
    )
    add("--budget", type=int, default=BUDGET, metavar="N", help="most alphas that --auto tries (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="the folder of the results, in which a stopped search continues")
    add(
        "--merge", metavar="OUT",
        help="merge at the best alpha into OUT, and check that the merge has the weights that were judged",
    )  # fmt: skip
    _add_generation_options(add)
    add("--version", action="version", version=f"expo {__version__}")
    return parser


def _add_generation_options(add: Callable[..., Any]) -> None:
    """Add the options of the models and of the sampling."""
    add("--limit", type=int, metavar="N", help="use the first N prompts only")
    add("--batch-size", type=int, default=16, metavar="N", help="replies sampled together (default: %(default)s)")
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="most tokens of a reply (default: %(default)s)")
    add("--seed", type=int, default=0, help="the seed of the sampling (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, or cuda[:index]")
    add(
        "--keep", choices=("device", "host", "disk"), default="device",
        help="where the original weights of both models are kept",
    )  # fmt: skip
    add("--on-unpaired", choices=ON_UNPAIRED, default="error", help="as for expo.fast")
    add("--on-mismatch", choices=ON_MISMATCH, default="error", help="as for expo.fast")
    add("--alpacaeval", action="store_true", help="also write a file of replies for each alpha, as AlpacaEval reads it")
    add("--trust-remote-code", action="store_true", help="run code that comes with the models")
    add("--quiet", action="store_true", help="print no progress, and no messages but warnings")


def parse_alphas(text: str) -> list[float]:
    """Return the alphas of a list and of ranges: 0.1,0.3 or 0.1:0.5:0.1 or 0.1:0.5:0.1,1.

    A range is first:last:step, and contains its last number.

    Raises:
        UsageError: The text is neither a list nor a range, or a range has no alpha or too many.
    """
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
        if not 1 <= count <= MOST_ALPHAS:
            raise UsageError(f"--alphas {part}: a range, first:last:step, must have 1 to {MOST_ALPHAS} alphas")
        alphas += [float(first + number * step) for number in range(count)]
    return alphas


def _search(options: argparse.Namespace, sft: StrPath, aligned: StrPath) -> SearchResult:
    """Check what can be checked without the models, then search."""
    alphas: list[float] | str = "auto" if options.auto else parse_alphas(options.alphas or GRID)
    prompts = read_prompts(options.prompts, options.limit)
    if options.merge is not None and os.path.lexists(options.merge):  # hours of sampling would be lost later
        raise OutputError(f"--merge {options.merge}: the path exists already; choose another name")
    _silence_libraries(options.quiet)
    from .alpha_search import search_alpha

    return search_alpha(
        sft, aligned, prompts, options.reward, alphas, options.out,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, seed=options.seed, device=options.device,
        keep=options.keep, budget=options.budget, on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch,
        trust_remote_code=options.trust_remote_code, alpacaeval=options.alpacaeval, digest=options.merge is not None,
        quiet=options.quiet,
    )  # fmt: skip


def _silence_libraries(quiet: bool) -> None:
    """Have transformers print errors only, and no progress bars if the user wants none."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    log: Any = transformers.logging
    log.set_verbosity_error()
    if quiet:
        log.disable_progress_bar()


def _table(result: SearchResult) -> list[str]:
    """Return a line for each alpha; * marks the best one, = those not distinguishable from it, and ! a warning."""
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
    """Merge at the best alpha, then load the merge and compare it with the model that was judged."""
    from ..merging.merge import merge
    from .merge_check import check_merge

    merged = merge(
        sft, aligned, result.best, options.merge,
        on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch, resume=True,
    )  # fmt: skip
    warn(merged.warnings)
    path = merged.outputs[0].path
    show(f"merged at alpha {result.best:g} -> {path}")
    print_message(f"loading {path}, to compare it with the model that was judged", options.quiet)
    check_merge(path, result.digests, options.trust_remote_code)
    show(f"checked: all {len(result.digests)} weights are those that were judged, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
