"""manifest.json: the files of an artifact, their hashes, and the versions that wrote them.

A hash shows that a file is unmodified, not who wrote it: an untrusted folder is safe to load because nothing in it is
executed, not because its hashes match.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from qpcompile.emit.artifact import names
from qpcompile.emit.artifact.folder import AGAIN, files, read_json, read_text, reading
from qpcompile.emit.artifact.json_text import MOST_BYTES
from qpcompile.emit.manifest_text import digest, sealed
from qpcompile.errors import ArtifactError, ExportError
from qpcompile.files import sha256
from qpcompile.recipe.messages import problems
from qpcompile.recipe.plan import LeftOut, Site
from qpcompile.recipe.quantize import Section
from qpcompile.stages import Stage
from qpcompile.versions import RECORDED, package_versions

NAME = "manifest.json"
FORMAT = 2
# Allowed file types. A sentencepiece vocabulary (.model) is binary data without a text format.
SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".txt", ".md", ".jinja", ".safetensors", ".model"})
# Allowed additional files that are never read: a report, pictures for the model card, files of git and of the hub.
BESIDE = frozenset({".html", ".md", ".png", ".svg", ".jpg", ".pdf", ".csv"})
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".msgpack"})
_PATH = re.compile(r"[\w-][\w.-]{0,199}(/[\w-][\w.-]{0,199}){0,4}", re.ASCII)
_PICKLE_PROTOCOL = re.compile(rb"\x80[\x02-\x05]")

Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$", max_length=names.MOST_CHARACTERS)]
Dotted = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=names.MOST_CHARACTERS)]
Key = Annotated[str, Field(min_length=1, max_length=2 * names.MOST_CHARACTERS)]


class FileEntry(Section):
    """One file that belongs to the artifact."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Hash of its bytes.")
    bytes: int = Field(ge=0, description="How many they are.")


class Manifest(Section):
    """The facts that no other file contains. Every key is checked against the other files."""

    format: Literal["qpcompile"] = Field(description="Identifies the format.")
    format_version: Literal[2] = Field(description="Version of the format.")
    versions: dict[Name, Annotated[str, Field(max_length=80)]] = Field(description="Packages that wrote it.")
    model_class: Name = Field(description="Class of the host in transformers.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(description="Floating-point type of the model.")
    attention: Literal["sdpa", "eager"] = Field(description="How the host makes masks.")
    processor: Name | None = Field(description="Class of the processor; null where the model came without one.")
    stage: Stage = Field(description="How far the compile went.")
    history: tuple[Name, ...] = Field(strict=False, max_length=100, description="The passes that ran.")
    layers: tuple[Dotted, ...] = Field(strict=False, max_length=4096, description="Modules of the decoder's layers.")
    graphs: tuple[Dotted, ...] = Field(strict=False, min_length=1, max_length=20, description="Names of the graphs.")
    host: dict[Dotted, Key] = Field(description="Stored tensor of each tensor of the host.")
    sites: tuple[Site, ...] = Field(strict=False, description="Everything that was quantized.")
    left_out: tuple[LeftOut, ...] = Field(strict=False, description="Everything in scope that was not.")
    files: dict[str, FileEntry] = Field(description="What belongs to the folder.")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List and hash every file of the folder, and add `facts`. Raises ExportError for facts that loading refuses."""
    listed = {
        path: {"sha256": sha256(folder / path), "bytes": (folder / path).stat().st_size}
        for path in files(folder, ExportError)
    }
    content = {
        "format": "qpcompile",
        "format_version": FORMAT,
        "versions": package_versions(RECORDED),
        **facts,
        "files": listed,
    }
    _checked(content, folder, ExportError)
    (folder / NAME).write_text(sealed(content), encoding="utf-8", newline="\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest, after checking that every listed file is unmodified and no other file could be read."""
    content = _parse(folder)
    manifest = _checked(content, folder, ArtifactError)
    for path in (found := files(folder)):
        if path not in manifest.files and path != NAME:
            _refuse_stranger(folder, path)
    for path, entry in manifest.files.items():
        _check_file(folder, path, entry, frozenset(found))
    refuse_files(folder, ArtifactError)
    return manifest


def refuse_files(folder: Path, error: type[ArtifactError] | type[ExportError]) -> None:
    """Refuse pickles, by name and by content, and file types that are not allowed."""
    for path in files(folder, error):
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
    """Parse the manifest, after checking its own digest."""
    path = folder / NAME
    with reading("the folder", folder):
        is_folder, is_file = folder.is_dir(), path.is_file()
    if not is_file:
        what = f"the folder has no {NAME}: it is not a saved model" if is_folder else "there is no such folder"
        raise ArtifactError(what, where=str(folder), do="name a folder that save_pretrained of a compiled model wrote")
    files(folder)
    content = read_json(path)
    if not isinstance(content, dict):
        raise _altered(path, "is not a list of files")
    version = content.get("format_version")
    if content.get("format") != "qpcompile" or version != FORMAT:
        raise ArtifactError(
            f"the artifact has format version {version!r:.40}, this version of qpcompile reads {FORMAT}",
            where=str(path),
            do="load it with the version that saved it, or compile the model again",
        )
    claimed = content.pop("digest", None)
    if claimed != digest(content) or read_text(path, MOST_BYTES) != sealed(content):
        raise _altered(path, "does not match its own digest, or is not written as a manifest is")
    return content


def _checked(content: dict[str, Any], folder: Path, error: type[ArtifactError] | type[ExportError]) -> Manifest:
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as problem:
        lines = problems(Manifest, problem, content)
        raise error(
            "\n  ".join([f"{NAME} cannot be used:", *lines[:10]]), where=str(folder / NAME), do=AGAIN
        ) from problem
    unknown = [name for name in manifest.graphs if not names.is_graph(name)]
    if unknown or len(set(manifest.graphs)) < len(manifest.graphs):
        what = f"a graph called {unknown[0]!r}" if unknown else "a graph twice"
        raise error(f"{NAME} cannot be used: it names {what}", where=str(folder / NAME), do=AGAIN)
    return manifest


def _check_file(folder: Path, path: str, entry: FileEntry, found: frozenset[str]) -> None:
    if not _PATH.fullmatch(path):
        raise _altered(folder / NAME, f"lists a file outside the folder: {path!r:.200}")
    target = folder / path
    if path not in found:
        raise ArtifactError("a file of the artifact is missing", where=str(target), do=AGAIN)
    with reading("the file", target):
        same = target.stat().st_size == entry.bytes and sha256(target) == entry.sha256
    if not same:
        raise _altered(target, "is not the file that was saved")


def _refuse_stranger(folder: Path, path: str) -> None:
    """Refuse a file that is not listed in the manifest, unless it is never read."""
    suffix = Path(path).suffix.lower()
    if suffix in BESIDE and not Path(path).name.startswith(".") and not _pickled(folder / path):
        return
    pickle = suffix in PICKLES or _pickled(folder / path)
    raise ArtifactError(
        f"{'a pickle: loading one can run any code; it' if pickle else 'a file'} does not belong to the artifact",
        where=str(folder / path),
        do="remove the file",
    )


def _pickled(path: Path) -> bool:
    """Whether a file starts like a pickle or like the zip archive of torch.save."""
    with reading("the file", path), path.open("rb") as file:
        start = file.read(4)
    return bool(_PICKLE_PROTOCOL.match(start)) or start == b"PK\x03\x04"


def _altered(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path.name} {what}", where=str(path), do=AGAIN)
