"""Atomic creation of files and folders: written to a temporary path, flushed to disk, renamed at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpcompile.claims import Claim, claimed, refuse_existing
from qpcompile.write_errors import full, writing

__all__ = ["flush", "refuse_existing", "replace_file", "sha256", "staged_folder", "write_new_file"]


@contextmanager
def staged_folder(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """A new temporary folder, renamed to `path` if the block succeeds and removed if it fails.

    path: may be a Claim, which keeps its owner. needed: bytes that will be written, if known; refused at once if the
    disk has fewer. Raises OutputError for every error of the operating system in the block.
    """
    with claimed(path, "folder") as claim, writing(claim.target, needed, claim.aside):
        _refuse_small_disk(claim.target, needed)
        yield claim.aside
        flush(claim.aside)
        claim.publish()
        _flush_entry(claim.target.parent)


def write_new_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Create a new file with `data` atomically. Raises OutputError if it exists or cannot be written.

    path: may be a Claim, which keeps its owner.
    """
    with claimed(path, "file") as claim:
        _write(claim, data)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Create or replace a file with `data` atomically. Raises OutputError."""
    with claimed(path, "file", replaces=True) as claim:
        _write(claim, data)


def flush(folder: Path) -> None:
    """fsync a folder's files and entries, so that the rename is never durable before the data.

    Files get the mode of the umask: some writers create private files.
    """
    mode = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        if path.is_file() or path.is_dir():
            _flush_entry(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
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
    """Refuse if the disk is too small; file systems without a size, such as /proc, report errors themselves."""
    room = shutil.disk_usage(target.parent)
    if needed is not None and room.total and room.free < needed:
        raise full(target, needed, room.free)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
