"""A comparison as a file: a picture, or all its numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

from ..cli import as_json
from ..errors import OutputError, UsageError
from ..inputs.resolve import StrPath
from ..output.os_errors import output_errors
from .heatmap import INSTALL, heat_map
from .records import Comparison

PICTURES, DATA = (".png", ".svg", ".pdf"), (".json",)


def write(found: Comparison, path: StrPath) -> None:
    """Write a report: a heat map as .png, .svg or .pdf, all numbers as .json; an old file is replaced.

    Raises UsageError, OutputError.
    """
    path = os.fspath(path)
    check_report(path)
    if path.lower().endswith(DATA):
        data = f"{as_json(asdict(found), indent=1)}\n".encode()
    else:
        data = heat_map(found, os.path.splitext(path)[1][1:].lower())
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
    """Raise UsageError or OutputError where no report can be written to `path`, as far as that can be seen before."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (*PICTURES, *DATA):
        raise UsageError(f"--out takes a file that ends in {', '.join((*PICTURES, *DATA))}, got {path!r}")
    if suffix in PICTURES and not _has_matplotlib():
        raise UsageError(INSTALL)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OutputError(f"{path}: there is no folder {folder}; make it, or choose another --out")
    if os.path.isdir(path):
        raise OutputError(f"{path}: a folder; choose another --out")
    for source in inputs:
        if source is not None and os.path.exists(source):
            real, place = os.path.realpath(source), os.path.realpath(path)
            if os.path.commonpath((real, place)) == real:
                raise OutputError(f"{path} is, or lies inside, the input {os.fspath(source)}; choose another --out")


def _has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None
