"""Exclusive claims on output paths, by file locks that end with the process.

    .qpcompile-<hash of the name>.partial     beside a new output: the partial output, locked while it is written
    a folder for progress or rows             is locked itself

The lock of a killed process is released, so the next writer removes its partial output. Locks are `flock` locks: they
work between processes on one machine, not between machines that share a disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Literal

from qpcompile.errors import OutputError
from qpcompile.write_errors import shown, unusable_path, writing

Kind = Literal["folder", "file"]
# Other processes may take or remove the same name in between; this many attempts failing is not by chance.
_TRIES = 100


@dataclass
class Claim(os.PathLike[str]):
    """A new output that only this process may write.

    target: the final path. aside: the locked temporary file or folder beside it that is renamed to it.
    """

    target: Path
    aside: Path
    kind: Kind
    replaces: bool = False

    def __fspath__(self) -> str:
        return str(self.target)

    def __str__(self) -> str:
        return str(self.target)

    def publish(self) -> None:
        """Rename the output to its final path; raises OutputError if something exists there by now."""
        if not self.replaces:
            refuse_existing(self.target)
        self.aside.replace(self.target)


@contextmanager
def claimed(path: str | os.PathLike[str], kind: Kind, *, replaces: bool = False) -> Iterator[Claim]:
    """Claim a path for a new file or folder until the block ends; an existing Claim keeps its owner.

    replaces: an existing file may be replaced. Raises OutputError if anything else exists there, another process writes
    there, or the path is not writable.
    """
    if isinstance(path, Claim) and path.kind == kind:
        yield path
        return
    target = absolute(path)
    aside = target.parent / f".qpcompile-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.partial"
    claim = Claim(target, aside, kind, replaces)
    made: list[Path] = []
    lock = None
    try:
        with writing(target, aside=aside):
            if not replaces:
                refuse_existing(target)
            lock = _take(claim, made)
            # It may have appeared before we got the lock.
            if not replaces:
                refuse_existing(target)
        yield claim
    finally:
        # An error of the block takes precedence over one of cleaning up, which the next writer repeats.
        with suppress(OSError):
            _discard(aside, lock)
        _remove_empty(made)


@contextmanager
def held_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A persistent folder, created if missing, exclusive to this process until the block ends.

    Raises OutputError if another process holds it, or it is not a folder.
    """
    folder = absolute(path)
    made: list[Path] = []
    lock = None
    try:
        with writing(folder):
            for _ in range(_TRIES):
                _make_folders(folder, made)
                if (lock := _lock(folder, folder)) is not None:
                    break
            else:
                raise _busy(folder)
        yield folder
    finally:
        _remove_empty(made)
        if lock is not None:
            os.close(lock)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path of an output; OutputError for text that is not a valid path."""
    text = os.fspath(path)
    if "\0" in text:
        raise unusable_path(text, "it has a NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise unusable_path(text, "it is not valid Unicode") from error
    with writing(Path(text)):
        return Path(os.path.abspath(text))


def refuse_existing(target: Path) -> None:
    """Raise OutputError if something exists at `target`, or the path is impossible: nothing is overwritten."""
    with writing(target):
        try:
            os.lstat(target)
        except FileNotFoundError:
            return
    raise OutputError(
        "the output exists already; nothing is overwritten",
        where=shown(target),
        do="name another path, or remove what is there first",
    )


def refuse_places(new: Mapping[str, Path | None], kept: Mapping[str, Path | None]) -> None:
    """Raise OutputError if new outputs exist, or one of all paths contains another. Keys: what they are."""
    places = {name: absolute(path) for name, path in {**new, **kept}.items() if path is not None}
    for name in places.keys() & new.keys():
        refuse_existing(places[name])
    real = {name: Path(os.path.realpath(path)) for name, path in places.items()}
    for (name, path), (other, outer) in permutations(real.items(), 2):
        if path == outer or outer in path.parents:
            raise OutputError(
                f"{name} and {other} are the same path, or one is inside the other",
                where=shown(path),
                do=f"name a path for {name} outside of {other}",
            )


def _take(claim: Claim, made: list[Path]) -> int:
    """Create and lock the temporary output; the remains of a dead process are removed first."""
    for _ in range(_TRIES):
        _make_folders(claim.target.parent, made)
        # If no file can be opened any more, nothing is created that could not be locked.
        os.close(os.open(claim.target.parent, os.O_RDONLY))
        try:
            if claim.kind == "folder":
                claim.aside.mkdir()
            else:
                os.close(os.open(claim.aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            _remove_left(claim)
        else:
            if (lock := _lock(claim.aside, claim.target, os.O_NOFOLLOW)) is not None:
                return lock
    raise _busy(claim.target)


def _remove_left(claim: Claim) -> None:
    """Remove the remains of a dead process; OutputError if the process is alive."""
    if claim.aside.is_symlink():
        claim.aside.unlink(missing_ok=True)
    else:
        _discard(claim.aside, _lock(claim.aside, claim.target, os.O_NOFOLLOW))


def _lock(path: Path, target: Path, flags: int = 0) -> int | None:
    """A descriptor that locks `path`; None if it is gone. OutputError if another process has locked it."""
    try:
        # A pipe at this path must not block us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    except FileNotFoundError:
        return None
    kept = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last owner may have moved or removed the opened file, and a new one created its own.
        kept = os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=not flags))
    except BlockingIOError:
        raise _busy(target) from None
    except FileNotFoundError:
        pass
    finally:
        if not kept:
            os.close(descriptor)
    return descriptor if kept else None


def _discard(aside: Path, lock: int | None) -> None:
    """Remove `aside`, locked by `lock`, and release the lock."""
    if lock is None:
        return
    try:
        if os.path.lexists(aside) and os.path.samestat(os.fstat(lock), os.lstat(aside)):
            if stat.S_ISDIR(os.fstat(lock).st_mode):
                shutil.rmtree(aside)
            else:
                aside.unlink()
    finally:
        os.close(lock)


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Create a folder and its parents; appends those that were missing to `made`, deepest first."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each) and each not in made]
    made[:0] = missing
    folder.mkdir(parents=True, exist_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, deepest first; others are kept."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _busy(target: Path) -> OutputError:
    return OutputError(
        "another command is writing there at this moment",
        where=shown(target),
        do="wait until it has ended, or name another path",
    )
