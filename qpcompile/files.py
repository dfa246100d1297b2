"""Folders and files that appear whole or not at all: written aside, flushed to disk, renamed at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpcompile.claims import Claim, claimed, refuse_existing
from qpcompile.write_errors import full, writing

__all__ = ["refuse_existing", "replace_file", "sha256", "staged_folder", "write_new_file"]


@contextmanager
def staged_folder(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """A new empty folder to write in, which becomes `path` when the block ends well and vanishes when it does not.

    path: may be a Claim, which stays its owner's. needed: bytes that will be written, when known; refused at once if
    the disk has fewer. Raises OutputError for every error of the operating system in the block.
    """
    with claimed(path, "folder") as claim, writing(claim.target, needed, claim.aside):
        _refuse_small_disk(claim.target, needed)
        yield claim.aside
        _flush(claim.aside)
        claim.publish()
        _flush_entry(claim.target.parent)


def write_new_file(path: str | os.PathLike[str], data: bytes) -> None:
    """A new file that holds `data`, or none at all. Raises OutputError where it exists or cannot be written.

    path: may be a Claim, which stays its owner's.
    """
    with claimed(path, "file") as claim:
        _write(claim, data)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """A file that holds `data`, in place of an older one of this name, whole or not at all. Raises OutputError."""
    with claimed(path, "file", replaces=True) as claim:
        _write(claim, data)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(claim: Claim, data: bytes) -> None:
    with writing(claim.target, len(data), claim.aside):
        _refuse_small_disk(claim.target, len(data))
        claim.aside.write_bytes(data)
        _flush_entry(claim.aside)
        claim.publish()
        _flush_entry(claim.target.parent)


def _refuse_small_disk(target: Path, needed: int | None) -> None:
    """Refuse where the disk has no room; file systems without a size, such as /proc, say so on their own."""
    room = shutil.disk_usage(target.parent)
    if needed is not None and room.total and room.free < needed:
        raise full(target, needed, room.free)


def _flush(folder: Path) -> None:
    """Force a folder's files and names to disk, so that the rename never outruns the bytes.

    Files get the mode that the umask gives new ones: some writers make private ones.
    """
    mode = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        if path.is_file() or path.is_dir():
            _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
