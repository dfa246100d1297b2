"""One process at a time writes an output, and a dead one does not block others."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qpcompile.claims import Claim, claimed, held_folder, refuse_places
from qpcompile.errors import OutputError
from qpcompile.files import replace_file, staged_folder, write_new_file

Claiming = Callable[[Path], AbstractContextManager[object]]
CLAIMS: dict[str, Claiming] = {
    "folder": lambda path: claimed(path, "folder"),
    "file": lambda path: claimed(path, "file"),
    "replaced file": lambda path: claimed(path, "file", replaces=True),
    "held folder": held_folder,
    "staged folder": staged_folder,
}


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does `work` and then waits to be killed; returns when the work is done."""
    ready, done = os.pipe()
    if child := os.fork():
        os.close(done)
        assert os.read(ready, 1) == b"x"
        return child
    try:
        work()
        os.write(done, b"x")
        signal.pause()
    finally:
        os._exit(1)


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", CLAIMS)
def test_second_claim_is_refused_until_the_first_ends(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with CLAIMS[name](target):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match="is writing there at this moment") as caught, CLAIMS[name](target):
            pytest.fail("the block must not run")
        assert caught.value.where == str(target) and caught.value.do
        assert sorted(tmp_path.rglob("*")) == before
        with CLAIMS[name](tmp_path / "new" / "another"):
            pass
    if name == "staged folder":
        assert target.is_dir()
    else:
        assert not os.listdir(tmp_path)
        with CLAIMS[name](target):
            pass


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_living_process_writes_stays_and_what_a_dead_one_left_goes(name: str, tmp_path: Path) -> None:
    target, held = tmp_path / "out", []

    def work() -> None:
        held.append(CLAIMS[name](target))
        place = held[0].__enter__()
        aside = place.aside if isinstance(place, Claim) else Path(str(place))
        if aside.is_dir() and aside != target:
            (aside / "half").mkdir()
            (aside / "half" / "file").write_text("half")

    child = in_child(work)
    left = os.listdir(tmp_path)
    assert len(left) == 1
    with pytest.raises(OutputError, match="is writing there"), CLAIMS[name](target):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == left
    killed(child)
    assert os.listdir(tmp_path) == left
    with CLAIMS[name](target) as place:
        aside = place.aside if isinstance(place, Claim) else Path(str(place))
        assert aside.is_file() or not os.listdir(aside)
    assert os.listdir(tmp_path) == (["out"] if name in ("staged folder", "held folder") else [])


@pytest.mark.parametrize("plant", ["file", "folder", "link", "pipe"])
def test_anything_in_the_way_that_nobody_holds_is_removed(plant: str, tmp_path: Path) -> None:
    with claimed(tmp_path / "out", "folder") as claim:
        aside = claim.aside
    (tmp_path / "mine").write_text("mine")
    if plant == "file":
        aside.write_text("x")
    elif plant == "folder":
        (aside / "x").mkdir(parents=True)
        (aside / "link").symlink_to(tmp_path / "mine")
    elif plant == "link":
        aside.symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(aside)
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"] and (tmp_path / "mine").read_text() == "mine"


def test_a_claim_is_written_by_its_owner(tmp_path: Path) -> None:
    with claimed(tmp_path / "out", "folder") as folder, claimed(tmp_path / "page", "file") as page:
        with pytest.raises(OutputError, match="is writing there"), staged_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
        with staged_folder(folder) as aside:
            (aside / "a").write_text("a")
        write_new_file(page, b"page")
        assert sorted(os.listdir(tmp_path)) == ["out", "page"]
        with pytest.raises(OutputError, match="exists already"):
            write_new_file(page, b"again")
    assert (tmp_path / "out" / "a").read_text() == "a" and (tmp_path / "page").read_bytes() == b"page"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "private").touch(0o600)
        write_new_file(tmp_path / "page", b"")
        replace_file(tmp_path / "table", b"")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o750, "sub": 0o750, "private": 0o640, "page": 0o640, "table": 0o640}


@pytest.mark.parametrize(
    ("output", "report", "resume", "said"),
    [
        ("out", "out/report.html", None, "report and output"),
        ("out", None, "out/progress", "resume and output"),
        ("out", "progress/report.html", "progress", "report and resume"),
        ("out", "link/out", None, "output and report are the same path"),
        ("here", None, None, "exists already"),
        ("out", "here", None, "exists already"),
    ],
)
def test_places_in_each_other_are_refused(
    output: str, report: str | None, resume: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "here").mkdir()
    places = [None if name is None else tmp_path / name for name in (output, report, resume)]
    with pytest.raises(OutputError, match=said):
        refuse_places({"output": places[0], "report": places[1]}, {"resume": places[2]})
    refuse_places({"output": tmp_path / "out", "report": tmp_path / "page"}, {"resume": tmp_path / "here"})
