"""Helpers that all command lines share: exit codes, signals, printing, JSON and the progress bar."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, TextIO

from .errors import ExpoError
from .options import MergeOptions
from .text import size_text

INTERRUPTED = 130  # the exit code after Ctrl-C, SIGTERM or SIGHUP
PATIENCE = 2.0  # seconds after a signal, in which further signals are ignored
MAX_BAR_WIDTH = 30  # characters
LOG_INTERVAL = 10.0  # seconds between two lines of progress if stderr is no terminal
# The library's messages name parameters between backticks, as Python has them; the command line prints its options.
PARAMETERS = {each.name for each in fields(MergeOptions)} | {
    "adapter_over", "aligned", "alpha", "base", "batch_size", "budget", "keep", "limit", "max_new_tokens", "out",
    "recipe", "reward", "sft", "trust_remote_code",
}  # fmt: skip
_PARAMETER = re.compile(r"`([a-z_]+)(?:=(?:\{r'([^`]*)': ([^`}]*)\}|\[?'?([^`'\]]*)'?\]?))?`")


def run(command: Callable[[], int], left: str = "nothing was left behind") -> int:
    """Run a command and return its exit code; after an error, print the message and return the error's exit code.

    Args:
        command: Does the work and returns an exit code.
        left: The text about the files that are left after an interrupt, unless the KeyboardInterrupt has a text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every path is text, and not every terminal uses UTF-8
    try:
        with signals():
            return command()
    except ExpoError as error:
        print(f"expo: error: {with_options(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"expo: interrupted; {with_options(str(interrupt) or left)}", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, so that they keep the finished part as Ctrl-C does."""
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # A signal that is ignored stays ignored, such as SIGHUP under nohup.
    before: dict[signal.Signals, Any] = {
        number: signal.getsignal(number) for number in stopping if signal.getsignal(number) is not signal.SIG_IGN
    }

    def interrupt(*_: object) -> None:
        # A second Ctrl-C that follows soon must neither interrupt the journal nor change the exit code. A later one
        # ends a process that cannot stop, because a disk or a GPU does not answer.
        soon = time.monotonic() + PATIENCE

        def end(*_: object) -> None:
            if time.monotonic() > soon:
                os.write(2, b"expo: ended before the work in progress was stopped\n")
                os._exit(INTERRUPTED)

        for number in before:
            signal.signal(number, end)
            before[number] = signal.SIG_IGN  # for the end of the process
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_options(text: str) -> str:
    """Return a message of the library with the command line's names: `--on-mismatch rows` for `on_mismatch='rows'`."""

    def option(found: re.Match[str]) -> str:
        name, pattern, alpha, value = found.groups()
        if name not in PARAMETERS:
            return found[0]
        if pattern is not None:
            return f"--alpha-for '{pattern}={alpha}'"
        return f"--{name.replace('_', '-')}" + (f" {shlex.quote(value)}" if value not in (None, "True") else "")

    return _PARAMETER.sub(option, text)


def add_base(add: Callable[..., Any]) -> None:
    """Add the options of two adapters over one base."""
    add("--base", metavar="M", help="the checkpoint under two LoRA adapters, if both A and B are adapters")
    add(
        "--adapter-over", choices=("base", "sft"),
        help="the model that B's adapter was trained on: M itself, or the model that A's adapter makes of M "
        "(default: the one that the config of B's adapter names)",
    )  # fmt: skip


def show(text: str) -> None:
    """Print a result to stdout."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has ended; Python must not fail when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_message(text: str, quiet: bool = False) -> None:
    """Print a message about the progress to stderr, unless the user wants none."""
    if not quiet:
        print(f"expo: {with_options(text)}", file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        print(f"expo: warning: {with_options(warning)}", file=sys.stderr)


def as_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, with null for inf and NaN, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    """Return the value with None in the place of every inf and NaN, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class Bar:
    """A progress bar on a terminal, or a line of progress every LOG_INTERVAL seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Choose the stream to write to; None means stderr."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._began = self._drawn = time.monotonic()
        self._open = False

    def __call__(self, done: int, total: int) -> None:
        """Show the progress, in bytes."""
        now = time.monotonic()
        if self._is_terminal:
            text = self._text(done, total, now)
            # A line that wraps could not be overwritten by the next one.
            width = max(0, min(MAX_BAR_WIDTH, shutil.get_terminal_size().columns - len(text) - 2))
            filled = width * done // total if total else width
            self._stream.write(f"\r{'█' * filled}{'░' * (width - filled)} {text}\x1b[K")
            self._stream.flush()
            self._open = True
        elif now - self._drawn >= LOG_INTERVAL:
            self._drawn = now
            print(self._text(done, total, now), file=self._stream, flush=True)

    def _text(self, done: int, total: int, now: float) -> str:
        share = done / total if total else 1.0
        rate = done / max(now - self._began, 1e-3)
        left = f"{(total - done) / rate:.0f} s left" if rate else "starting"
        return f"{share:4.0%}  {size_text(done)} of {size_text(total)}, {size_text(rate)}/s, {left}"

    def close(self) -> None:
        """Erase the bar."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open = False
