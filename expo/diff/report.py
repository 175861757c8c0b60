"""Write a comparison to a file: a picture, or all its numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

from ..cli import as_json
from ..errors import OutputError, UsageError
from ..inputs.locations import StrPath
from ..output.os_errors import output_errors
from .heatmap import INSTALL, draw_heat_map
from .records import Comparison

PICTURES, DATA = (".png", ".svg", ".pdf"), (".json",)  # suffixes


def write_report(comparison: Comparison, path: StrPath) -> None:
    """Write a heat map (.png, .svg, .pdf) or all numbers (.json) in one step; an old file is replaced.

    Raises:
        UsageError: The suffix is unknown, or matplotlib is missing.
        OutputError: The file could not be written.
    """
    path = os.fspath(path)
    check_report(path)
    if path.lower().endswith(DATA):
        data = f"{as_json(asdict(comparison), indent=1)}\n".encode()
    else:
        data = draw_heat_map(comparison, os.path.splitext(path)[1][1:].lower())
    staged = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    with output_errors(path):
        try:
            with open(staged, "wb") as file:
                file.write(data)
            os.replace(staged, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise


def check_report(path: str, inputs: Sequence[StrPath | None] = ()) -> None:
    """Check, before the comparison, that a report can be written to `path` and replaces none of the inputs.

    Raises:
        UsageError: The suffix is unknown, or matplotlib is missing.
        OutputError: The path is a folder, is in no folder, or is in an input.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (*PICTURES, *DATA):
        raise UsageError(f"`out` takes a file that ends in {', '.join((*PICTURES, *DATA))}, got {path!r}")
    if suffix in PICTURES and not _has_matplotlib():
        raise UsageError(INSTALL)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OutputError(f"{path}: there is no folder {folder}; create it, or choose another `out`")
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; choose another `out`")
    for source in inputs:
        if source is not None and os.path.exists(source):
            real_source, real_path = os.path.realpath(source), os.path.realpath(path)
            if os.path.commonpath((real_source, real_path)) == real_source:
                raise OutputError(f"{path} is, or lies inside, the input {os.fspath(source)}; choose another `out`")


def _has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None
