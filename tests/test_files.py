"""Folders appear whole or not at all."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qpcompile.errors import OutputError
from qpcompile.files import sha256, staged_folder, write_new_file


def test_folder_appears_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with staged_folder(target) as folder:
        (folder / "graph").mkdir()
        (folder / "graph" / "prefill.txt").write_text("x")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "graph" / "prefill.txt").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == target.parent.stat().st_mode & 0o777


def test_relative_path_is_taken_from_where_the_block_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder("out/"):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_target_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already") as caught, staged_folder(target):
        pytest.fail("the block must not run")
    assert caught.value.where == str(target) and caught.value.do
    assert os.listdir(tmp_path) == ["out"]


def test_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), staged_folder(target) as folder:
        (folder / "a").write_text("a")
        target.mkdir()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), OutputError("mine")])
def test_any_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, staged_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "half").write_text("half")
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_parents_that_others_filled_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), staged_folder(tmp_path / "a" / "out"):
        (tmp_path / "a" / "other").write_text("not ours")
        raise ValueError
    assert os.listdir(tmp_path / "a") == ["other"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_full_disk_says_how_much(tmp_path: Path, error: Exception) -> None:
    said = r"disk is full: 1\.0 MiB had been written; nothing was left there"
    with pytest.raises(OutputError, match=said) as caught, staged_folder(tmp_path / "out") as folder:
        (folder / "half").write_bytes(b"x" * 1024**2)
        raise error
    assert caught.value.__cause__ is error
    assert os.listdir(tmp_path) == []


def test_free_space_is_that_of_the_targets_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {tmp_path / "a" / "b": 7 * 1024**2}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path], total=1))
    target, said = tmp_path / "a" / "b" / "out", r"8\.0 MiB are needed, 7\.0 MiB are free"
    with pytest.raises(OutputError, match=said), staged_folder(target, needed=8 * 1024**2):
        pytest.fail("the block must not run")


def test_disk_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 1024**3, total=4 * 1024**3))
    said, needed = r"3072\.0 MiB are needed, 2048\.0 MiB are free", 3 * 1024**3
    with pytest.raises(OutputError, match=said), staged_folder(tmp_path / "deep" / "out", needed=needed):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


def test_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["file"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_new_file_appears_whole_and_replaces_nothing(tmp_path: Path) -> None:
    write_new_file(tmp_path / "a" / "report.html", b"first")
    with pytest.raises(OutputError, match="exists"):
        write_new_file(tmp_path / "a" / "report.html", b"second")
    assert (tmp_path / "a" / "report.html").read_bytes() == b"first"
    assert os.listdir(tmp_path / "a") == ["report.html"]


def test_full_disk_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_new_file(tmp_path / "a" / "report.html", b"text")
    assert os.listdir(tmp_path) == []
