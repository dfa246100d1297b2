"""manifest.json: which files belong to an artifact, their hashes, and the versions that wrote them.

A hash shows that a file is the one that was written. It does not show who wrote it: a folder from a stranger is safe to
load because nothing in it is executed, not because its hashes agree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpcompile.errors import ArtifactError, ExportError
from qpcompile.files import sha256
from qpcompile.versions import RECORDED, package_versions

NAME = "manifest.json"
FORMAT = 1
# What an artifact may hold. A sentencepiece vocabulary (.model) is data that no text form exists for.
SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".txt", ".md", ".jinja", ".safetensors", ".model"})
# What may lie beside it and is never read: a report, pictures for the model card, files of git and of the hub.
BESIDE = frozenset({".html", ".md", ".png", ".svg", ".jpg", ".pdf", ".csv"})
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".msgpack"})
_PATH = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_PICKLE_PROTOCOL = re.compile(rb"\x80[\x02-\x05]")
_AGAIN = "get the folder again from where it was saved, or save the model again"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List and hash every file of the folder, with `facts` beside them."""
    paths = list(_files(folder))
    files = {path: {"sha256": sha256(folder / path), "bytes": (folder / path).stat().st_size} for path in paths}
    content = {
        "format": "qpcompile",
        "format_version": FORMAT,
        "versions": package_versions(RECORDED),
        **facts,
        "files": files,
    }
    text = json.dumps({**content, "digest": _digest(content)}, indent=2) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8", newline="\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file it lists was found unaltered and no file beside them could be taken for one."""
    content = _parse(folder)
    version = content.get("format_version")
    if content.get("format") != "qpcompile" or version != FORMAT:
        raise ArtifactError(
            f"the artifact has format version {version}, this version of qpcompile reads {FORMAT}",
            where=str(folder / NAME),
            do="load it with the version that saved it, or compile the model again",
        )
    if content.pop("digest", None) != _digest(content):
        raise _altered(folder / NAME, "does not match its own digest")
    files = content["files"]
    for path in _files(folder):
        if path not in files and path != NAME:
            _refuse_stranger(folder, path)
    for path, entry in files.items():
        _check_file(folder, path, entry)
    refuse_files(folder, ArtifactError)
    return content


def refuse_files(folder: Path, error: type[ArtifactError] | type[ExportError]) -> None:
    """Refuse pickles, by name and by content, and kinds of files that an artifact does not hold."""
    for path in _files(folder):
        suffix = Path(path).suffix.lower()
        if suffix in PICKLES or _pickled(folder / path):
            raise error(
                "a pickle must not be in an artifact: loading one can run any code",
                where=str(folder / path),
                do="remove the file; tensors are stored as safetensors",
            )
        if suffix not in SUFFIXES | BESIDE:
            raise error(
                f"an artifact holds no {suffix or 'such'} files", where=str(folder / path), do="remove the file"
            )


def _parse(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        what = "there is no such folder" if not folder.is_dir() else f"the folder has no {NAME}: it is no saved model"
        raise ArtifactError(what, where=str(folder), do="name a folder that save_pretrained of a compiled model wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _altered(path, f"cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("files", {}), dict):
        raise _altered(path, "is no list of files")
    return content


def _check_file(folder: Path, path: str, entry: dict[str, Any]) -> None:
    if not _PATH.fullmatch(path):
        raise _altered(folder / NAME, f"lists a file outside the folder: {path!r}")
    target = folder / path
    if not target.is_file():
        raise ArtifactError("a file of the artifact is missing", where=str(target), do=_AGAIN)
    if target.stat().st_size != entry["bytes"] or sha256(target) != entry["sha256"]:
        raise _altered(target, "is not the file that was saved")


def _refuse_stranger(folder: Path, path: str) -> None:
    """A file the manifest does not list is let be only if nothing would ever read it."""
    suffix = Path(path).suffix.lower()
    if suffix in BESIDE and not _pickled(folder / path):
        return
    pickle = suffix in PICKLES or _pickled(folder / path)
    raise ArtifactError(
        f"{'a pickle: loading one can run any code; it' if pickle else 'a file'} does not belong to the artifact",
        where=str(folder / path),
        do="remove the file",
    )


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files below the folder, sorted; those of git and the hub's cache (dotted names) only if pickles."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if (path.is_file() or path.is_symlink()) and (not hidden or path.suffix.lower() in PICKLES):
            yield relative.as_posix()


def _pickled(path: Path) -> bool:
    """Whether a file begins as a pickle or as the zip archive that torch.save makes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return bool(_PICKLE_PROTOCOL.match(start)) or start == b"PK\x03\x04"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _altered(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path.name} {what}", where=str(path), do=_AGAIN)
