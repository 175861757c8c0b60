"""A progress bar on stderr: one line that redraws itself on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

WIDTH = 30  # characters of the bar
LOG_EVERY = 10.0  # seconds between lines where stderr is no terminal


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
        return f"{share:4.0%}  {size(done)} of {size(total)}, {size(rate)}/s, {left}"

    def close(self) -> None:
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open = False


def size(count: float) -> str:
    """Bytes for a reader, in powers of 1000: 4.40 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
