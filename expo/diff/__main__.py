"""The command line: python -m expo.diff --sft A --aligned B [--out report.png|report.json]

Arguments to compare() to a table, and nothing else: results on stdout, progress and messages on stderr.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from .. import __version__
from ..cli import Bar, as_json, run, show, warn
from ..options import ON_MISMATCH, ON_UNPAIRED
from ..text import size_text
from .report import check_report, write
from .table import table

EPILOG = """\
relative norm: |aligned - sft| / |aligned|; 1-cos: 1 - cosine similarity of sft and aligned
exit codes: 0 done; 1 a bug; 2 usage; 3 the inputs cannot be compared; 4 the report could not be written;
130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_report(options.out, (options.sft, options.aligned))
    from .comparing import compare

    began = time.perf_counter()
    bar = None if options.quiet else Bar()
    try:
        found = compare(
            options.sft, options.aligned, recipe=options.recipe, on_unpaired=options.on_unpaired,
            on_mismatch=options.on_mismatch, progress=bar, quiet=options.quiet,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    seconds = time.perf_counter() - began
    warn(found.warnings)
    if options.out is not None:
        write(found, options.out)
    if options.json:
        show(as_json(asdict(found)))
    elif not options.quiet:
        lines = list(table(found, shutil.get_terminal_size().columns))
        lines.append(
            f"{size_text(found.bytes_read)} read in {seconds:.2f} s, {size_text(found.bytes_read / seconds)}/s"
        )
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
    add("--sft", metavar="A", help="the earlier checkpoint: a folder, a .safetensors or .bin file, or a hub id")
    add("--aligned", metavar="B", help="the checkpoint trained from it: likewise, or a LoRA adapter folder over sft")
    add("--recipe", metavar="NAME", help="a published pair: gives --sft and --aligned where they are left out")
    add("--out", metavar="FILE", help="a heat map as .png, .svg or .pdf (needs matplotlib), or all numbers as .json")
    add("--on-unpaired", choices=ON_UNPAIRED, default="aligned", help="a tensor in one input only: refuse, or list it")
    add(
        "--on-mismatch", choices=ON_MISMATCH, default="rows",
        help="a tensor of two shapes: refuse, compare the rows that both have, or list it",
    )  # fmt: skip
    add("--json", action="store_true", help="print all numbers as one JSON object")
    add("--quiet", action="store_true", help="no progress and no table")
    add("--version", action="version", version=f"expo {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
