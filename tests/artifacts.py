"""Change files of an artifact folder as somebody would who can write to it: the hashes agree again afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpcompile.emit.artifact.manifest import _text
from qpcompile.files import sha256

MANIFEST = "manifest.json"


def read(folder: Path, name: str) -> Any:
    """What a JSON file of the folder says."""
    return json.loads((folder / name).read_text())


def replace(folder: Path, name: str, data: bytes | str) -> None:
    """Put other bytes in place of a file: whatever else is linked to the old ones keeps them."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def rehash(folder: Path, **changes: Any) -> None:
    """Give the manifest the hashes of the files that lie there, and `changes`."""
    content = read(folder, MANIFEST) | changes
    content.pop("digest", None)
    for name, entry in content["files"].items() if isinstance(content.get("files"), dict) else ():
        path = folder / name
        if isinstance(entry, dict) and path.is_file() and os.access(path, os.R_OK):
            entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    replace(folder, MANIFEST, _text(content))


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file says; `change` gives the new value, or changes the old one and gives None."""
    data = read(folder, name)
    new = change(data)
    replace(folder, name, json.dumps(data if new is None else new, indent=2))
    rehash(folder)
