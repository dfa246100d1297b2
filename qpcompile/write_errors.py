"""Translate operating-system errors about a path to OutputErrors."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpcompile.errors import OutputError, QPCompileError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DO = {
    errno.ENAMETOOLONG: "choose a shorter path; a single name has at most 255 bytes on most disks",
    errno.ENOTDIR: "name another path: a part of this one is a file, not a folder",
    errno.EEXIST: "name another path: a part of this one is a file or a dangling link, not a folder",
    errno.ELOOP: "name another path: links in this one lead in a circle",
    errno.EROFS: "this disk is read-only: name a folder on another one",
    errno.EMFILE: "close files of this process, or raise its limit (ulimit -n), and try again",
    errno.ENFILE: "the machine has too many open files: close some programs and try again",
    errno.EIO: "the disk reports a fault: check it, and name a folder on another one",
    errno.EDQUOT: "your quota on this disk is used up: free some space or name a folder on another disk",
    errno.EILSEQ: "choose another path, or mend the text that is not valid Unicode",
    errno.ENOSPC: "free some space or name a folder on another disk",
}
# Libraries written in Rust report errors of the operating system as text only.
_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(target: Path, needed: int | None = None, aside: Path | None = None) -> Iterator[None]:
    """Errors of the operating system in the block become OutputErrors about `target`.

    needed: bytes that the block writes, if known. aside: where it writes them.
    """
    try:
        yield
    except Exception as error:
        if (found := os_error(error)) is None:
            raise
        raise cannot_write(target, found, needed, aside) from error


def os_error(error: Exception) -> OSError | None:
    """The operating system's error that an exception is or reports; None if it is about something else."""
    if isinstance(error, QPCompileError):
        return None
    if isinstance(error, OSError):
        return error
    if isinstance(error, UnicodeError):
        return OSError(errno.EILSEQ, str(error))
    number = int(found[1]) if (found := _RUST.search(str(error))) else None
    if number is None:
        number = next((each for each in _FULL if os.strerror(each) in str(error)), None)
    return None if number is None else OSError(number, os.strerror(number))


def cannot_write(target: Path, error: OSError, needed: int | None = None, aside: Path | None = None) -> OutputError:
    """Why `target` was not written: must be called before the partial output in `aside` is removed."""
    what = f"the output cannot be written: {error.strerror or error}"
    if error.errno in _FULL:
        what = f"the disk is full: {_room(target, needed, aside)}; nothing was left there"
    elif error.filename is not None and _is_elsewhere(error.filename, target, aside):
        what += f": {shown(error.filename)}"
    do = _DO.get(error.errno or 0, "name a folder that you may write in")
    return OutputError(what, where=shown(target), do=do)


def full(target: Path, needed: int, free: int) -> OutputError:
    """The error for a disk without enough room."""
    return OutputError(
        f"the disk is full: {_mebibytes(needed)} are needed, {_mebibytes(free)} are free",
        where=shown(target),
        do=_DO[errno.ENOSPC],
    )


def unusable_path(path: str, why: str) -> OutputError:
    """The error for text that is not a valid file name."""
    return OutputError(
        f"this is not the name of a file: {why}", where=shown(path), do="choose a path without such characters"
    )


def shown(path: str | bytes | os.PathLike[str]) -> str:
    """A path as one line of printable text."""
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)


def _room(target: Path, needed: int | None, aside: Path | None) -> str:
    """Why a disk is full, with consistent numbers."""
    written = _mebibytes(_size(aside))
    # The target's folder may be gone: the nearest remaining parent is on the same disk.
    above = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(above).free
    if needed is not None and free < needed:
        return f"{_mebibytes(needed)} are needed, {written} had been written and {_mebibytes(free)} were free"
    entries = os.statvfs(above)
    if entries.f_files and not entries.f_favail:
        return f"it takes no more files, {written} had been written"
    return f"{written} had been written"


def _size(path: Path | None) -> int:
    """Bytes of a file, or of the files in a folder; 0 if it does not exist."""
    if path is None or not os.path.lexists(path):
        return 0
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.lstat().st_size for part in parts if part.is_file())


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


def _is_elsewhere(filename: str | bytes, target: Path, aside: Path | None) -> bool:
    """Whether an error is about a file other than the output."""
    named = Path(os.fsdecode(filename))
    return named != target and (aside is None or (named != aside and aside not in named.parents))
