"""What the long passes of one compile have found so far, in a folder: stopped, it goes on there.

    key                     what is compiled: model, recipe, samples and versions
    <what>.safetensors      tensors and facts of one pass, or of one part of it

Nothing but tensors and JSON is in it; files are written aside and moved. The folder stays when the compile is done.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qpcompile.errors import OutputError

KEY = "key"
SECONDS = 120.0
"""How much work is lost at most, but for one sample, block or weight."""


@dataclass
class Checkpoint:
    """See the module's docstring. Without a folder nothing is kept and nothing is found."""

    folder: Path | None = None
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, key: str) -> Checkpoint:
        """The checkpoint in a folder, made where there is none.

        Raises OutputError where the folder holds something else, or the checkpoint of another compile.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                (folder / KEY).write_text(key)
            found = (folder / KEY).read_text() if (folder / KEY).is_file() else ""
        except OSError as error:
            raise _unusable(folder, f"cannot be used: {error.strerror or error}") from error
        if found != key:
            raise _unusable(
                folder, "belongs to another model, recipe, calibration or version" if found else "is no checkpoint"
            )
        return cls(folder)

    def due(self) -> bool:
        """Whether a pass in the middle of its work should save."""
        return self.folder is not None and time.monotonic() - self.last > SECONDS

    def load(self, what: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The tensors and the facts saved under a name, None where there are none."""
        if self.folder is None or not (path := self._path(what)).is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _unusable(path, f"cannot be read: {error}") from error

    def save(self, what: str, tensors: dict[str, torch.Tensor], facts: Any) -> None:
        """Keep tensors and what JSON can hold, in place of what was kept under this name."""
        if self.folder is None:
            return
        path = self._path(what)
        aside = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"facts": json.dumps(facts)}
            )
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise _unusable(path, f"cannot be written: {error}") from error
        self.last = time.monotonic()

    def _path(self, what: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{what}.safetensors"


def _unusable(where: Path, why: str) -> OutputError:
    return OutputError(
        f"the checkpoint {why}", where=str(where), do="name a new folder, or remove this one to begin from the start"
    )
