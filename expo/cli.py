"""What the command lines share: exit codes, signals, and what is printed where."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from .errors import ExpoError
from .text import size_text

INTERRUPTED = 130
WIDTH = 30  # characters of the bar
LOG_EVERY = 10.0  # seconds between lines where stderr is no terminal


def run(work: Callable[[], int], left: str = "nothing was left behind") -> int:
    """The exit code of a command: work's own, or that of its error, which is explained on stderr.

    left: what an interrupt leaves, where the interrupt does not say so itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text, and a terminal no UTF-8
    try:
        with signals():
            return work()
    except ExpoError as error:
        print(f"expo: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"expo: interrupted; {str(interrupt) or left}", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does: what is done is kept to go on from, exit code 130."""
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # nohup has SIGHUP ignored, and it stays so
    before = {number: signal.getsignal(number) for number in stops if signal.getsignal(number) is not signal.SIG_IGN}

    def interrupt(*_: object) -> None:
        # For good: a second Ctrl-C must not cut short the writing down of what is done, nor change the exit code.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        before.clear()
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(text: str) -> None:
    """Print a result to stdout."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # ... | head: nobody is left to read the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_message(text: str, quiet: bool = False) -> None:
    """Print a message about the progress to stderr, unless the user wants none."""
    if not quiet:
        print(f"expo: {text}", file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        print(f"expo: warning: {warning}", file=sys.stderr)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON has no inf and no NaN: null stands for them."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class Bar:
    """Call it with (done, total) in bytes; `close` ends the line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._began = self._drawn = time.monotonic()
        self._open = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._live:
            text = self._text(done, total, now)
            width = max(0, min(WIDTH, shutil.get_terminal_size().columns - len(text) - 2))  # a wrapped line piles up
            filled = width * done // total if total else width
            self._stream.write(f"\r{'█' * filled}{'░' * (width - filled)} {text}\x1b[K")
            self._stream.flush()
            self._open = True
        elif now - self._drawn >= LOG_EVERY:
            self._drawn = now
            print(self._text(done, total, now), file=self._stream, flush=True)

    def _text(self, done: int, total: int, now: float) -> str:
        share = done / total if total else 1.0
        rate = done / max(now - self._began, 1e-3)
        left = f"{(total - done) / rate:.0f} s left" if rate else "starting"
        return f"{share:4.0%}  {size_text(done)} of {size_text(total)}, {size_text(rate)}/s, {left}"

    def close(self) -> None:
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open = False
