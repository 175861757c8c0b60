"""Merges that a test interrupts after some chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from expo.merging import rank_worker


class Stop(Exception):
    """The exception with which a test interrupts a merge."""


def interrupted(monkeypatch: pytest.MonkeyPatch, chunks: int, error: BaseException, work: Callable[[], Any]) -> str:
    """Do the work until so many chunks are written, let the next write fail, and return the message."""
    sink, seen = rank_worker.RankWorker._write, iter(range(10**6))

    def failing(self: Any, *arguments: Any) -> None:
        if next(seen) >= chunks:
            raise error
        sink(self, *arguments)
        time.sleep(0.001)  # some reports of progress must happen before the end

    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.RankWorker, "_write", failing)
        with pytest.raises(type(error)) as caught:
            work()
    return str(caught.value)
