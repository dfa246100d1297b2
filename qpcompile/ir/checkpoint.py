"""Checkpoints of the long passes of one compile, in a folder, so that an interrupted compile can resume.

    key                     what is compiled: model, recipe, samples and versions; and a hash of this text
    <what>.safetensors      tensors and facts of one pass, or of one part of it; and a hash of these, <what> and the key

It contains only tensors and JSON, and nothing in it is executed; files are written to a temporary name and renamed. The
hashes detect damaged and foreign files; they are not signatures. The folder remains after the compile.

Of several ranks only rank 0 reads and writes it. What it reads it sends to the others, so all ranks must ask for the
same in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  (a bare PathLike)

from qpcompile.errors import OutputError
from qpcompile.files import flush
from qpcompile.ranks import Ranks
from qpcompile.write_errors import shown, writing

KEY = "key"
SECONDS = 120.0
"""Seconds of work that can be lost at most, plus one sample, block or weight."""

_PARTIAL = ".partial"
_SUFFIX = ".safetensors"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Kept:
    """The contents of one file. Methods raise ValueError for contents that no pass has written."""

    tensors: dict[str, torch.Tensor]
    facts: Any

    def fits(self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
        """The tensors in this order; they must be exactly the expected ones: name -> (shape, dtype)."""
        for name in (*expected, *self.tensors):
            if name not in expected or name not in self.tensors:
                raise ValueError(f"the tensor {name} is {'missing' if name in expected else 'not known'}")
            found, (shape, dtype) = self.tensors[name], expected[name]
            if found.dtype != dtype or tuple(found.shape) != tuple(shape):
                raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, not {dtype}{list(shape)}")
        return {name: self.tensors[name] for name in expected}

    def read(self, kind: type[_T]) -> _T:
        """The facts, which must be of this type."""
        return TypeAdapter(kind).validate_python(self.facts)


@dataclass
class Checkpoint:
    """See the module's docstring. Without a folder nothing is saved and nothing is found."""

    folder: Path | None = None
    key: str = ""
    ranks: Ranks = field(default_factory=Ranks)
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, key: str, ranks: Ranks | None = None) -> Checkpoint:
        """Open or create the checkpoint in a folder; partial files of a killed compile are removed.

        Raises OutputError if the folder contains something else, or the checkpoint of another compile.
        """
        opened = cls(folder, key, ranks or Ranks())
        if not opened.ranks.leads:
            return opened
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove(folder / _PARTIAL)
            names = sorted(os.listdir(folder))
            _refuse_foreign(folder, names)
            text = f"{key}\n{_digest(key)}\n"
            if not names:
                with _aside(folder / KEY) as aside:
                    aside.write_text(text, encoding="utf-8")
            found = (folder / KEY).read_bytes()
        if found != text.encode():
            lines = found.decode(errors="replace").rpartition("\n")[0].rpartition("\n")
            if lines[2] != _digest(lines[0]):
                raise _unusable(folder / KEY, "is damaged", "remove the folder to begin from the start")
            raise _unusable(folder, "belongs to another model, recipe, calibration or version", _ANOTHER)
        return opened

    def due(self) -> bool:
        """Whether a pass in the middle of its work should save; rank 0 decides."""
        return self.folder is not None and self.ranks.gathered(time.monotonic() - self.last > SECONDS)[0]

    @contextmanager
    def found(self, what: str) -> Generator[Kept | None]:
        """The contents saved under a name, None if there are none.

        Raises OutputError for a damaged file, and if the block raises ValueError on its contents.
        """
        if self.folder is None:
            yield None
            return
        path, kept = self._path(what), None
        if self.ranks.leads and os.path.lexists(path):
            with _reading(path):
                kept = self._read(path, what)
        if self.ranks.size > 1:
            known, facts = self.ranks.gathered((kept is not None, None if kept is None else kept.facts))[0]
            tensors = self.ranks.shared({} if kept is None else kept.tensors)[0]
            kept = Kept(tensors, facts) if known else None
        if kept is None:
            yield None
            return
        with _reading(path):
            yield kept

    def save(self, what: str, tensors: dict[str, torch.Tensor], facts: Any) -> None:
        """Save tensors and JSON-serializable facts under this name, replacing earlier ones."""
        if self.folder is None or not self.ranks.leads:
            return
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(facts)
        header = {"facts": text, "sha256": self._hash(what, tensors.items(), text)}
        with _aside(self._path(what)) as aside:
            save_file(tensors, aside, header)
        self.last = time.monotonic()

    def _read(self, path: Path, what: str) -> Kept:
        _refuse_no_file(path)
        with _opened(path) as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("sha256") != self._hash(what, tensors.items(), header["facts"]):
            raise ValueError("its hash is not that of its content")
        return Kept(tensors, json.loads(header["facts"]))

    def _hash(self, what: str, tensors: Iterable[tuple[str, torch.Tensor]], facts: str) -> str:
        """SHA-256 over the contents of a file, its name and the key."""
        total = hashlib.sha256()
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            total.update(_digest(f"{name} {tensor.dtype} {list(tensor.shape)}").encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for text in (what, self.key, facts):
            total.update(_digest(text).encode())
        return total.hexdigest()

    def _path(self, what: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{what}{_SUFFIX}"


_ANOTHER = "name a new folder, or remove this one to begin from the start"


def _refuse_foreign(folder: Path, names: list[str]) -> None:
    """Raise OutputError for a folder that contains anything not written by a compile."""
    if names and KEY not in names:
        raise _unusable(folder, f"has no key, so this is not a checkpoint; it holds {shown(names[0])}", _ANOTHER)
    for name in names:
        if name != KEY and not name.endswith(_SUFFIX):
            raise _unusable(folder / name, "has a file that does not belong to it", "remove the file")
        with _reading(folder / name):
            _refuse_no_file(folder / name)


def _opened(path: Path) -> Any:
    """A safetensors file, whose methods have no types."""
    return safe_open(path, "pt")


def _refuse_no_file(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is a link, a folder or something else, not a file")


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Errors about the content of a file become an OutputError that names it."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[:1]
        said = what if isinstance(what, str) else "".join(what) or type(error).__name__
        raise _unusable(
            path, f"cannot be read: {said}", "remove this file: what it held is computed again; or remove the folder"
        ) from error


@contextmanager
def _aside(path: Path) -> Generator[Path]:
    """A temporary file, renamed to `path` when the block succeeds. Its mode follows the umask."""
    folder = path.with_name(_PARTIAL)  # a folder, since writers of libraries have temporary files of their own
    aside = folder / "new"
    with writing(path, aside=folder):
        try:
            _remove(folder)
            folder.mkdir()
            yield aside
            flush(folder)
            os.replace(aside, path)
        finally:
            with suppress(OSError):
                _remove(folder)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unusable(where: Path, why: str, do: str) -> OutputError:
    return OutputError(f"the checkpoint {why}", where=shown(where), do=do)
