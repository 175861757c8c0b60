"""Prompts from files of every format, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from expo import errors
from expo.search.prompts import read_prompts


def test_prompts_of_every_format(tmp_path: Path) -> None:
    formats = {
        "a.jsonl": '{"prompt": "one"}\n\n{"instruction": "two", "output": "x"}\r\n',
        "a.json": '[{"instruction": "one", "output": "", "generator": "g", "dataset": "d"}, "two"]',
        "a.txt": "one\r\n\n  two\n",
    }
    for name, text in formats.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == ["one", "two"]
        assert read_prompts(tmp_path / name, 1) == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "one"}\n', 'line 1: needs a text as "prompt" or "instruction", got keys text'),
        ("a.json", "{}", "must have a list, got dict"),
        ("a.json", "[3]", "entry 0: .* got int"),
        ("a.txt", "\n \n", "no prompt"),
        ("a.txt", "\udcff", "not UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(errors.UsageError, match=message):
        read_prompts(tmp_path / name)
