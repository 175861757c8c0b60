"""What the command lines share: exit codes, signals, and what is printed where."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .errors import ExpoError

INTERRUPTED = 130


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
