"""A folder is whole or as it was, whatever fails and wherever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrid_lm import files
from hybrid_lm.files import DiskError, discard, finite, new_folder, replace_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    return tmp_path / "out"


def test_a_new_folder_takes_the_place_of_the_old_one(old):
    with new_folder(old, "cannot write") as new:
        (new / "below").mkdir()
        (new / "below" / "other").write_text("new")
        assert (old / "file").read_text() == "old"
    assert [path.relative_to(old.parent).as_posix() for path in sorted(old.parent.rglob("*"))] == [
        "out",
        "out/below",
        "out/below/other",
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_changes_nothing(old, error):
    def fill():
        with new_folder(old, "cannot write") as new:
            (new / "other").write_text("new")
            raise error("in the block")

    with pytest.raises(error, match="in the block"):
        fill()
    assert [path.name for path in old.parent.iterdir()] == ["out"]
    assert (old / "file").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", [1, 2])
def test_the_old_folder_comes_back_if_a_rename_fails(old, monkeypatch, error, nth):
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == nth:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def fill():
        with new_folder(old, "cannot write out") as new:
            (new / "other").write_text("new")

    with pytest.raises((DiskError, KeyboardInterrupt)) as caught:
        fill()
    if isinstance(error, OSError):
        assert str(caught.value) == "cannot write out: No space left on device"
        assert caught.value.errno == 28
    assert [path.name for path in old.parent.iterdir()] == ["out"]
    assert (old / "file").read_text() == "old"


def test_what_cannot_be_put_back_is_not_deleted(old, monkeypatch):
    rename = Path.rename

    def only_away(self, target):
        if target.name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_away)

    def fill():
        with new_folder(old, "cannot write out"):
            pass

    with pytest.raises(DiskError, match="Input/output error"):
        fill()
    (kept,) = old.parent.iterdir()
    assert (kept / "file").read_text() == "old"


def test_a_link_keeps_pointing_where_it_points(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    with new_folder(tmp_path / "link", "cannot write") as new:
        (new / "other").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in old.iterdir()] == ["other"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path, (tmp_path / "out").exists())))
    with new_folder(tmp_path / "out", "cannot write") as new:
        (new / "below").mkdir()
        (new / "below" / "file").write_text("x")
    assert {path.name for path, named in synced if not named} == {new.name, "below", "file"}
    assert synced[-1] == (tmp_path, True)


def test_a_text_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    replace_text(tmp_path / "a", "one")

    def failing(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DiskError, match=r"cannot write .*/a: Read-only file system"):
        replace_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"


def test_discarding_leaves_nothing(old):
    discard(old)
    assert not list(old.parent.iterdir())


def test_what_json_does_not_have_is_none():
    nan, inf = float("nan"), float("inf")
    assert finite({"a": [nan, 1.5, (inf, "x")], "b": {"c": -inf}, "d": 3}) == {
        "a": [None, 1.5, [None, "x"]],
        "b": {"c": None},
        "d": 3,
    }
