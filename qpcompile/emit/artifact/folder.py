"""List and read the files of an artifact folder. Links and devices are refused, not followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from qpcompile.emit.artifact import json_text
from qpcompile.errors import ArtifactError, ExportError, QPCompileError

AGAIN = "get the folder again from where it was saved, or save the model again"
# Created by git, the hub and file managers next to model files; never read.
HIDDEN = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"})
MOST_FILES, MOST_DEPTH = 10_000, 4
# Size limit of text files other than JSON: recipe, plan, template, card.
MOST_BYTES = 8 * 2**20


def files(folder: Path, error: type[ArtifactError] | type[ExportError] = ArtifactError) -> list[str]:
    """Paths of all files below the folder, sorted. Raises `error` for a link, a device, or a folder too deep."""
    found = []
    for path in _walk(folder, folder, 0, error):
        found.append(path)
        if len(found) > MOST_FILES:
            raise error(
                f"the folder holds more than {MOST_FILES} files", where=str(folder), do="remove what is not its"
            )
    return sorted(found)


def _walk(root: Path, folder: Path, depth: int, error: type[ArtifactError] | type[ExportError]) -> Iterator[str]:
    with reading("the folder", folder), os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path = Path(entry.path)
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise error(
                f"the folder holds a {'link' if stat.S_ISLNK(mode) else 'special file'}; only plain files are read",
                where=str(path),
                do="copy the files themselves (cp -L, or a download with local_dir), and remove what is not a file",
            )
        if depth == 0 and entry.name in HIDDEN:
            continue
        if stat.S_ISREG(mode):
            yield path.relative_to(root).as_posix()
        elif depth < MOST_DEPTH:
            yield from _walk(root, path, depth + 1, error)
        else:
            raise error(f"folders are nested more than {MOST_DEPTH} deep", where=str(path), do="remove this folder")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a text file of the folder. Raises ArtifactError if it is too large, unreadable, or not text."""
    with reading("the file", path):
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size} bytes, {most} are read")
        return path.read_bytes().decode("utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of the folder. Raises ArtifactError for anything else."""
    text = read_text(path, json_text.MOST_BYTES)
    with reading("the file", path):
        return json_text.parse(text)


@contextmanager
def reading(what: str, where: PathLike[str] | str, do: str = AGAIN) -> Iterator[None]:
    """Convert any error in the block to an ArtifactError naming `what` and `where`, with the cause chained.

    Libraries raise arbitrary errors on untrusted files, and Rust panics are not even Exceptions.
    """
    try:
        yield
    except QPCompileError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{what} cannot be read: {error.what}", where=os.fspath(where), do=do) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split())
        raise ArtifactError(
            f"{what} cannot be read: {type(error).__name__}: {text[:300]}", where=os.fspath(where), do=do
        ) from error
