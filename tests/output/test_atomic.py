"""Durable files and names that change in one step: nothing is ever replaced that must stay."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from output_faults import c_library_whose

from expo.output.atomic import exchange, place_under_free_name, write_durably


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    if not exchange(str(tmp_path / "one"), str(tmp_path / "two")):
        pytest.skip("this filesystem cannot swap two folders")
    assert os.listdir(tmp_path / "one") == ["was-two"]
    assert os.listdir(tmp_path / "two") == ["was-one"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_exchange_says_where_the_system_cannot(code: int | None) -> None:
    with c_library_whose("renameat2", code):
        assert exchange("a", "b") is False


def test_exchange_raises_what_is_no_lack_of_support(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(str(tmp_path / "one"), str(tmp_path / "two"))


def test_a_durable_file_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_durably(str(path), [b"one", b"two"])
    assert path.read_bytes() == b"onetwo"
    with pytest.raises(FileExistsError):
        write_durably(str(path), [b"three"])
    assert path.read_bytes() == b"onetwo"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    source, taken, free = (tmp_path / name for name in ("source", "taken", "free"))
    source.write_text("new")
    taken.write_text("old")
    with pytest.raises(FileExistsError):
        place_under_free_name(str(source), str(taken))
    assert taken.read_text() == "old"
    place_under_free_name(str(source), str(free))
    assert free.read_text() == "new"
