"""Exports are complete or absent, and nothing that exists is overwritten."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.export.places import is_elsewhere, link_or_copy, new_file, new_folder

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep"
    with new_folder(output, 1) as folder:
        (folder / "a").write_text("content")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["a"]
    assert [path.name for path in output.parent.iterdir()] == ["deep"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", 1) as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(InvalidArgumentError, match="exists and isn't empty"), new_folder(tmp_path, 1):
        pytest.fail("the work began")
    with pytest.raises(InvalidArgumentError, match="a is a file; name a folder"), new_folder(tmp_path / "a", 1):
        pytest.fail("the work began")


def test_a_file_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(InvalidArgumentError, match="a exists; name a new file"), new_file(tmp_path / "a", 1):
        pytest.fail("the work began")
    with pytest.raises(InvalidArgumentError, match="is a folder; name a file"), new_file(tmp_path, 1):
        pytest.fail("the work began")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("place", [new_folder, new_file])
def test_nothing_is_left_of_an_export_that_failed(place: object, tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep"
    with pytest.raises(CheckpointError, match=r"can't be written: .*No space left.*make room"):
        write_half(place, output)
    assert list(tmp_path.iterdir()) == []


def write_half(place: Any, output: Path) -> None:
    with place(output, 1) as path:
        (path / "a" if place is new_folder else path).write_text("half")
        raise FULL


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new", 1):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_permission_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # nothing is forbidden to root: let the system say so
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    else:
        tmp_path.chmod(0o500)
    for place in (new_folder, new_file):
        refused = pytest.raises(InvalidArgumentError, match=r"can't be written .*name a place where you may write")
        with refused, place(tmp_path / "new", 1):
            pytest.fail("the work began")


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="can't be written"), new_folder(tmp_path / "file" / "new", 1):
        pytest.fail("the work began")


def test_a_disk_that_is_too_small_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    refused = pytest.raises(InvalidArgumentError, match=r"takes 20\.0 MB, and its disk has 10\.0 MB free")
    with refused, new_folder(tmp_path / "new", 20_000_000):
        pytest.fail("the work began")
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_copied_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_elsewhere(tmp_path / "file", tmp_path / "new" / "deep")
    assert is_elsewhere(tmp_path / "file", Path("/proc/new"))


def test_files_are_linked_or_else_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_text("content")
    (tmp_path / "link").symlink_to("blob")  # as in the hub's cache
    assert link_or_copy(tmp_path / "link", tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert not (tmp_path / "linked").is_symlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another file system")))
    assert not link_or_copy(tmp_path / "link", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "content"
    assert (tmp_path / "copied").stat().st_nlink == 1
