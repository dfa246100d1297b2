"""Pickling of a compiled model as the files of its artifact folder, with the same hashes and checks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qpcompile.emit.artifact import artifact
from qpcompile.ir.program import Program

_NAME = "model"


def to_files(program: Program, processor: Any) -> dict[str, bytes]:
    """Path in the artifact folder -> content. Raises ExportError for a model that an artifact cannot hold."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / _NAME
        artifact.save(program, processor, folder)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def from_files(files: dict[str, bytes]) -> tuple[Program, Any]:
    """The inverse of `to_files`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / _NAME
        for path, content in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return artifact.load(folder)
