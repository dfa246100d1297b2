"""Any error of the operating system for a path becomes what, where and what to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qpcompile.claims import held_folder
from qpcompile.errors import OutputError
from qpcompile.files import replace_file, staged_folder, write_new_file
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.write_errors import shown, writing


def stage(path: str) -> None:
    with staged_folder(path) as folder:
        (folder / "file").write_text("text")


def hold(path: str) -> None:
    with held_folder(path) as folder:
        Checkpoint.open(folder, "key").save("a", {}, {})


WRITERS: dict[str, Callable[[str], None]] = {
    "folder": stage,
    "file": lambda path: write_new_file(path, b"text"),
    "replaced": lambda path: replace_file(path, b"text"),
    "held": hold,
}
GOOD = {
    "long": "x" * 255,
    "accents": "é" * 120,
    "newline": "a\nb",
    "spaces": " a b ",
    "bytes": "\udcff\udcfe",
    "hidden": ".out",
    "emoji": "🐢",
    "deep": "/".join("d" * 200 for _ in range(15)),
}
BAD = {
    "too long": ("x" * 256, "name too long"),
    "too many bytes": ("é" * 128, "name too long"),
    "too deep": ("/".join("d" * 200 for _ in range(25)), "name too long"),
    "NUL": ("a\0b", "NUL character"),
    "surrogate": ("a\ud800b", "not valid Unicode"),
    "below a file": ("file/out", "Not a directory|File exists"),
    "below a dangling link": ("dangling/out", "File exists"),
    "below a circle": ("circle/out", "symbolic links|File exists"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", GOOD)
def test_names_that_a_disk_takes(name: str, writer: str, tmp_path: Path) -> None:
    WRITERS[writer](f"{tmp_path}/{GOOD[name]}")
    assert os.listdir(tmp_path) == [GOOD[name].split("/")[0]]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", BAD)
def test_names_that_no_disk_takes(name: str, writer: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    text, said = BAD[name]
    with pytest.raises(OutputError, match=said) as caught:
        WRITERS[writer](f"{tmp_path}/{text}")
    assert caught.value.where and caught.value.do and str(caught.value).encode()
    assert sorted(os.listdir(tmp_path)) == ["circle", "dangling", "file"]


@pytest.mark.parametrize("writer", ["folder", "file", "replaced"])
@pytest.mark.parametrize("place", ["dangling", "folder"])
def test_only_a_replaced_file_is_replaced(place: str, writer: str, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    if writer == "replaced" and place == "dangling":
        WRITERS[writer](str(tmp_path / place))
        assert (tmp_path / place).read_bytes() == b"text"
        return
    with pytest.raises(OutputError) as caught:
        WRITERS[writer](str(tmp_path / place))
    assert caught.value.do and sorted(os.listdir(tmp_path)) == ["dangling", "folder"]


@pytest.mark.parametrize("writer", WRITERS)
def test_proc_is_not_called_a_full_disk(writer: str) -> None:
    with pytest.raises(OutputError, match="cannot be written") as caught:
        WRITERS[writer]("/proc/x")
    assert "full" not in str(caught.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_working_folder_that_is_gone(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="cannot be written"):
        WRITERS[writer]("out")


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_more_files_can_be_open(writer: str, tmp_path: Path) -> None:
    lowest = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest), pytest.raises(OutputError, match="Too many open files") as caught:
        WRITERS[writer](str(tmp_path / "out"))
    assert "ulimit" in (caught.value.do or "") and os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_may_not_grow(writer: str, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 1), pytest.raises(OutputError, match=r"File too large|os error 27"):
        WRITERS[writer](str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "fault"),
        (OSError("Unable to save it"), "Unable to save it"),
        (Exception("Error while serializing: I/O error: Read-only file system (os error 30)"), "read-only"),
        (RuntimeError(f"stream: {os.strerror(errno.ENOSPC)}"), "disk is full"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "not valid Unicode"),
    ],
)
def test_errors_of_libraries(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, staged_folder(tmp_path / "out"):
        raise error
    assert said in str(caught.value) and caught.value.__cause__ is error and os.listdir(tmp_path) == []


def test_no_two_numbers_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, writing(tmp_path / "out", needed=100):
        raise OSError(errno.ENOSPC, "full")
    assert "needed" not in caught.value.what and "free" not in caught.value.what


def test_what_is_about_another_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No such file or directory: .*/gone"), staged_folder(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()


@pytest.mark.parametrize(("path", "text"), [("a b", "a b"), ("a\nb", r"'a\nb'"), ("\udcff", r"'\udcff'"), ("é", "é")])
def test_paths_are_shown_on_one_line(path: str, text: str) -> None:
    assert shown(path) == text
