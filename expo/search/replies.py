"""The folder of a search: every reply is a line of replies.jsonl as soon as it is scored, and a search goes on there.

settings.json says what the replies were made with. Both are plain text for other programs to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import OutputError
from ..inputs.resolve import StrPath

SETTINGS = "settings.json"
REPLIES = "replies.jsonl"


@dataclass(frozen=True)
class Reply:
    """One model's reply to one prompt, and what it is worth.

    index: the prompt's, from 0. new_tokens: generated ones, with the one that ends it. finished: it has that one.
    repetition: share of its 4-grams of tokens that occurred in it before.
    """

    alpha: float
    index: int
    prompt: str
    reply: str
    reward: float
    new_tokens: int
    finished: bool
    repetition: float


FIELDS = tuple(field.name for field in fields(Reply))


class Replies:
    """The replies in a folder, by (alpha, index of the prompt)."""

    def __init__(self, folder: StrPath, settings: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it. Raises OutputError where it holds something else, or is in use."""
        self.folder = os.fspath(folder)
        self._lines: BinaryIO | None = None
        self._all: dict[tuple[float, int], Reply] = {}
        with _explained(self.folder):
            os.makedirs(self.folder, exist_ok=True)
            self._check(dict(settings))
            self._lines = open(os.path.join(self.folder, REPLIES), "a+b")  # noqa: SIM115
            try:
                self._lock(self._lines)
                self._read(self._lines)
            except BaseException:
                self.close()
                raise

    def _check(self, settings: dict[str, Any]) -> None:
        """That the folder is empty or holds replies made with the same settings."""
        path = os.path.join(self.folder, SETTINGS)
        try:
            with open(path, encoding="utf-8") as file:
                before = json.load(file)
        except FileNotFoundError:
            others = sorted(os.listdir(self.folder))
            if others:
                raise OutputError(
                    f"{self.folder}: there is {others[0]} in it but no {SETTINGS}, so it is no search to go on with; "
                    "choose another --out"
                ) from None
            _write(path, settings)
            return
        except ValueError as error:
            raise OutputError(f"{path}: not JSON ({error}); choose another --out") from error
        if not isinstance(before, dict):
            raise OutputError(f"{path}: not an object; choose another --out")
        now = json.loads(json.dumps(settings))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys and not self._empty():
            differ = "; ".join(f"{key} was {_short(before.get(key))} and is now {_short(now.get(key))}" for key in keys)
            raise OutputError(
                f"{self.folder} holds replies of another search: {differ}. Choose another --out, or the same settings"
            )
        if keys:
            _write(path, settings)

    def _empty(self) -> bool:
        """Whether no reply was written before the search ended."""
        path = os.path.join(self.folder, REPLIES)
        return not os.path.exists(path) or not os.path.getsize(path)

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.folder}: another search is writing to it; wait, or choose another --out"
            ) from None
        except OSError:
            pass  # a filesystem without locks

    def _read(self, file: BinaryIO) -> None:
        """Take in what is there; a last line that a kill cut short is dropped."""
        file.seek(0)
        good = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(good)
                return
            reply = _parsed(line)
            if reply is None:
                raise OutputError(f"{file.name}, line {number}: not a reply; delete the line, or choose another --out")
            self._all.setdefault((reply.alpha, reply.index), reply)
            good += len(line)

    def add(self, replies: Iterable[Reply]) -> None:
        """Append replies to the file at once. Raises OutputError."""
        if self._lines is None:
            raise OutputError(f"{self.folder} is closed")
        new = {(reply.alpha, reply.index): reply for reply in replies}
        new = {key: reply for key, reply in new.items() if key not in self._all}
        lines = [json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in new.values()]
        with _explained(self.folder):
            self._lines.write("".join(lines).encode())
            self._lines.flush()
        self._all.update(new)

    def of(self, alpha: float, count: int) -> list[Reply] | None:
        """The replies to all prompts, in their order; None while some are missing."""
        found = [self._all.get((alpha, index)) for index in range(count)]
        complete = [reply for reply in found if reply is not None]
        return complete if len(complete) == count else None

    def has(self, alpha: float, indices: Iterable[int]) -> bool:
        return all((alpha, index) in self._all for index in indices)

    @property
    def alphas(self) -> list[float]:
        """Those with a reply at least, in ascending order."""
        return sorted({alpha for alpha, _ in self._all})

    def __len__(self) -> int:
        return len(self._all)

    def write(self, name: str, value: Any) -> str:
        """Write a JSON file beside the replies, whole or not at all, and return its path. Raises OutputError."""
        path = os.path.join(self.folder, name)
        with _explained(self.folder):
            _write(path, value)
        return path

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _parsed(line: bytes) -> Reply | None:
    try:
        value = json.loads(line)
        values = {name: value[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        return None
    numbers = [values[name] for name in ("alpha", "index", "reward", "new_tokens", "repetition")]
    if not all(isinstance(number, (int, float)) for number in numbers) or not isinstance(values["reply"], str):
        return None
    return Reply(**values)


def _write(path: str, value: Any) -> None:
    beside = f"{path}.new"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(beside, path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def _explained(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise OutputError(
            f"{where}: {error.strerror or error}; make room or choose another --out, what is written there is kept"
        ) from error
