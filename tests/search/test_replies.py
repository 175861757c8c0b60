"""The folder of the replies: one search at a time, and damaged lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expo import errors
from expo.search.replies import Reply, ReplyStore


def test_a_folder_has_one_writer_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    reply = Reply(0.0, 0, "p", "r", 1.0, 100, True, 0.02)
    with ReplyStore(tmp_path / "a", {"x": 1}) as store:
        store.add([reply, reply])
        with pytest.raises(errors.OutputError, match="another search is writing"):
            ReplyStore(tmp_path / "a", {"x": 1})
    path = tmp_path / "a" / "replies.jsonl"
    assert path.read_text().count("\n") == 1
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(errors.OutputError, match="line 1: not a reply"):
        ReplyStore(tmp_path / "a", {"x": 1})
    path.write_text("")
    ReplyStore(tmp_path / "a", {"x": 2}).close()  # an empty file may take other settings
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"x": 2}
