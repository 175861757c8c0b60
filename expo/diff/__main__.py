"""The command line: python -m expo.diff --sft A --aligned B [--out report.png|report.json]

This module turns arguments into a call of compare(), and the result into a table. Results go to stdout, and progress
and messages to stderr.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from .._version import __version__
from ..cli import Bar, add_base, as_json, run, show, warn
from ..options import ON_MISMATCH, ON_UNPAIRED
from ..text import size_text
from .report import check_report, write_report
from .table import make_table

EPILOG = """\
relative norm: |aligned - sft| / |aligned|; 1-cos: 1 - the cosine similarity of sft and aligned
exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be compared; 4 the report could not be written;
130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    """Compare, write the report, and print the result."""
    if options.out is not None:
        check_report(options.out, (options.sft, options.aligned))
    from .comparison import compare

    start = time.perf_counter()
    bar = None if options.quiet else Bar()
    try:
        comparison = compare(
            options.sft, options.aligned, recipe=options.recipe, base=options.base,
            adapter_over=options.adapter_over, on_unpaired=options.on_unpaired,
            on_mismatch=options.on_mismatch, progress=bar, quiet=options.quiet,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    seconds = time.perf_counter() - start
    warn(comparison.warnings)
    if options.out is not None:
        write_report(comparison, options.out)
    if options.json:
        show(as_json(asdict(comparison)))
    elif not options.quiet:
        lines = list(make_table(comparison, shutil.get_terminal_size().columns))
        size, speed = size_text(comparison.bytes_read), size_text(comparison.bytes_read / seconds)
        lines.append(f"{size} read in {seconds:.2f} s, {speed}/s")
        show("\n".join([*lines, *([f"-> {options.out}"] if options.out else [])]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expo.diff",
        description="Show what training changed between two checkpoints of a language model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sft", metavar="A", help="the sft checkpoint: a folder, a .safetensors or .bin file, or a hub id")
    add(
        "--aligned", metavar="B",
        help="the checkpoint that was trained from sft: the same, or the folder of a LoRA adapter for sft",
    )  # fmt: skip
    add_base(add)
    add("--recipe", metavar="NAME", help="a public pair, which gives --sft and --aligned if they are left out")
    add("--out", metavar="FILE", help="a heat map as .png, .svg or .pdf (needs matplotlib), or all numbers as .json")
    add(
        "--on-unpaired", choices=ON_UNPAIRED, default="aligned",
        help="what to do with a tensor that one checkpoint alone has: refuse, or list it (default: %(default)s)",
    )  # fmt: skip
    add(
        "--on-mismatch", choices=ON_MISMATCH, default="rows",
        help="what to do with a tensor of two shapes: refuse, compare the rows that both have, or list it "
        "(default: %(default)s)",
    )  # fmt: skip
    add("--json", action="store_true", help="print all numbers as one JSON object")
    add("--quiet", action="store_true", help="print neither progress nor table")
    add("--version", action="version", version=f"expo {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
