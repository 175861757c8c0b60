"""Store the replies of a search in a folder, so that a search that was stopped can continue.

Every reply is a line of replies.jsonl as soon as it is scored, and settings.json has the settings that the replies were
made with. Both files are plain text that other programs can read.
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
from ..inputs.locations import StrPath

SETTINGS = "settings.json"
REPLIES = "replies.jsonl"
MOST_SHOWN = 80  # characters of a setting that a message shows


@dataclass(frozen=True)
class Reply:
    """One model's reply to one prompt, with its reward.

    Attributes:
        alpha: The alpha of the model.
        index: The number of the prompt, from 0.
        prompt: The prompt.
        reply: The text of the reply.
        reward: The reward.
        new_tokens: The number of generated tokens, the end token included.
        finished: True if the reply has an end token.
        repetition: The share of its 4-grams of tokens that occurred earlier in the reply.
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


class ReplyStore:
    """The replies in a folder, by alpha and by the number of the prompt. One process at a time may open a folder."""

    def __init__(self, folder: StrPath, settings: Mapping[str, Any]) -> None:
        """Create the folder, or continue with the replies in it.

        Raises:
            OutputError: The folder has other files or replies made with other settings, or another search uses it.
        """
        self.folder = os.fspath(folder)
        self._file: BinaryIO | None = None
        self._replies: dict[tuple[float, int], Reply] = {}
        with _explain_errors(self.folder):
            os.makedirs(self.folder, exist_ok=True)
            self._check_settings(dict(settings))
            self._file = open(os.path.join(self.folder, REPLIES), "a+b")  # noqa: SIM115
            try:
                self._lock(self._file)
                self._read(self._file)
            except BaseException:
                self.close()
                raise

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Raise OutputError unless the folder is empty or has replies made with the same settings."""
        path = os.path.join(self.folder, SETTINGS)
        try:
            with open(path, encoding="utf-8") as file:
                earlier = json.load(file)
        except FileNotFoundError:
            others = sorted(os.listdir(self.folder))
            if others:
                raise OutputError(
                    f"{self.folder}: the folder has {others[0]} but no {SETTINGS}, so it is not the folder of a "
                    "search; choose another `out`"
                ) from None
            _write_json(path, settings)
            return
        except ValueError as error:
            raise OutputError(f"{path}: not JSON ({error}); choose another `out`") from error
        if not isinstance(earlier, dict):
            raise OutputError(f"{path}: not a JSON object; choose another `out`")
        now = json.loads(json.dumps(settings))
        changed = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
        if changed and not self._is_empty():
            changes = "; ".join(
                f"{key} was {_shorten(earlier.get(key))} and is now {_shorten(now.get(key))}" for key in changed
            )
            raise OutputError(
                f"{self.folder} has the replies of another search: {changes}. Choose another `out`, or the same "
                "settings"
            )
        if changed:
            _write_json(path, settings)

    def _is_empty(self) -> bool:
        """Return True if the earlier search ended before it wrote a reply."""
        path = os.path.join(self.folder, REPLIES)
        return not os.path.exists(path) or not os.path.getsize(path)

    def _lock(self, file: BinaryIO) -> None:
        """Raise OutputError if another process has the folder open."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.folder}: another search is writing to it; wait, or choose another `out`"
            ) from None
        except OSError:
            pass  # some filesystems have no locks

    def _read(self, file: BinaryIO) -> None:
        """Read the replies of earlier searches, and drop a last line that is incomplete because a kill cut it short."""
        file.seek(0)
        complete = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(complete)
                return
            reply = _parse_reply(line)
            if reply is None:
                raise OutputError(f"{file.name}, line {number}: not a reply; delete the line, or choose another `out`")
            self._replies.setdefault((reply.alpha, reply.index), reply)
            complete += len(line)

    def add(self, replies: Iterable[Reply]) -> None:
        """Append the replies that are new to the file, in one write. Raises OutputError."""
        if self._file is None:
            raise OutputError(f"{self.folder} is closed")
        new = {(reply.alpha, reply.index): reply for reply in replies}
        new = {key: reply for key, reply in new.items() if key not in self._replies}
        lines = [json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in new.values()]
        with _explain_errors(self.folder):
            self._file.write("".join(lines).encode())
            self._file.flush()
        self._replies.update(new)

    def replies_to_all(self, alpha: float, prompts: int) -> list[Reply] | None:
        """Return an alpha's replies to the first `prompts` prompts, in their order; None while some are missing."""
        replies = [self._replies.get((alpha, index)) for index in range(prompts)]
        complete = [reply for reply in replies if reply is not None]
        return complete if len(complete) == prompts else None

    def has_all(self, alpha: float, indices: Iterable[int]) -> bool:
        """Return True if no reply of this alpha to the prompts of these numbers is missing."""
        return all((alpha, index) in self._replies for index in indices)

    @property
    def alphas(self) -> list[float]:
        """The alphas with at least one reply, in ascending order."""
        return sorted({alpha for alpha, _ in self._replies})

    def __len__(self) -> int:
        return len(self._replies)

    def write_json(self, name: str, value: Any) -> str:
        """Write a JSON file beside the replies, in one step, and return its path. Raises OutputError."""
        path = os.path.join(self.folder, name)
        with _explain_errors(self.folder):
            _write_json(path, value)
        return path

    def close(self) -> None:
        """Close the file, which ends the lock of the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _parse_reply(line: bytes) -> Reply | None:
    """Return the reply of a line of the file, or None if the line has no reply."""
    try:
        value = json.loads(line)
        values = {name: value[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        return None
    numbers = [values[name] for name in ("alpha", "index", "reward", "new_tokens", "repetition")]
    if not all(isinstance(number, (int, float)) for number in numbers) or not isinstance(values["reply"], str):
        return None
    return Reply(**values)


def _write_json(path: str, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    beside = f"{path}.new"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(beside, path)


def _shorten(value: Any) -> str:
    """Return a setting as JSON, cut to the length that a message shows."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


@contextlib.contextmanager
def _explain_errors(folder: str) -> Iterator[None]:
    """Turn an error of the filesystem into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: {error.strerror or error}; free some space or choose another `out`. All "
            "replies that are written are kept"
        ) from error
