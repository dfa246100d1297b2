"""A disk that fills up, for tests of code that writes several files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest


def fill(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """After `after` complete files the next one is written by half; then the disk is full."""
    left, write = [after], Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if left[0] > 0:
            left[0] -= 1
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
