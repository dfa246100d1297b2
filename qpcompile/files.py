"""Folders and files that appear whole or not at all: written aside, flushed to disk, renamed at the end."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpcompile.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def staged_folder(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """A new empty folder to write in, which becomes `path` when the block ends well and vanishes when it does not.

    needed: bytes that will be written, when known; refused at once if the disk has fewer.
    """
    target = Path(os.path.abspath(path))
    refuse_existing(target)
    made = _make_parents(target)
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        _refuse_small_disk(target, needed)
        try:
            aside.mkdir()
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield aside
        _flush(aside)
        refuse_existing(target)
        aside.rename(target)
        _flush_entry(target.parent)
    except BaseException as error:
        written = _size(aside)
        shutil.rmtree(aside, ignore_errors=True)
        _remove(made)
        if _disk_full(error):
            raise _full(target, written, needed) from error
        raise


def write_new_file(path: str | os.PathLike[str], data: bytes) -> None:
    """A new file that holds `data`, or none at all. Raises OutputError where it exists or cannot be written."""
    target = Path(os.path.abspath(path))
    refuse_existing(target)
    made = _make_parents(target)
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        _refuse_small_disk(target, len(data))
        aside.write_bytes(data)
        _flush_entry(aside)
        refuse_existing(target)
        aside.rename(target)
        _flush_entry(target.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        _remove(made)
        if isinstance(error, OSError):
            raise _cannot_write(target, error, len(data)) from error
        raise


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(target: Path) -> None:
    """Raise OutputError where something lies at `target`: nothing is overwritten."""
    if os.path.lexists(target):
        raise OutputError(
            "the output exists already; nothing is overwritten",
            where=str(target),
            do="name another path, or remove what lies there first",
        )


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above `target`; those that were missing, deepest first."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove(made)
        raise _cannot_write(target, error) from error
    return made


def _remove(folders: list[Path]) -> None:
    """Remove empty folders, deepest first; stop at one that somebody else uses by now."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _refuse_small_disk(target: Path, needed: int | None) -> None:
    if needed is not None and shutil.disk_usage(target.parent).free < needed:
        raise _full(target, 0, needed)


def _disk_full(error: BaseException) -> bool:
    """Whether an error means a full disk. Writers in Rust and C++ report it as text only."""
    return getattr(error, "errno", None) in _FULL or (
        isinstance(error, Exception) and not isinstance(error, OutputError) and os.strerror(errno.ENOSPC) in str(error)
    )


def _full(target: Path, written: int, needed: int | None) -> OutputError:
    # The folders that would hold the target may be gone again: the nearest one left is on the same disk.
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    need = f"{_mebibytes(needed)} are needed" if needed is not None else f"{_mebibytes(written)} had been written"
    return OutputError(
        f"the disk is full: {need}, {_mebibytes(free)} are free now",
        where=str(target),
        do="free some space or name a folder on another disk; nothing was left behind",
    )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


def _cannot_write(target: Path, error: OSError, needed: int | None = None) -> OutputError:
    if error.errno in _FULL:
        return _full(target, 0, needed)
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        where=str(target),
        do="name a folder that you may write in",
    )


def _size(folder: Path) -> int:
    """Bytes in the files below a folder; 0 when it is not there."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    """Force a folder's files and names to disk, so that the rename never outruns the bytes."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
