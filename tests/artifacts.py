"""Change files of an artifact folder as an attacker with write access would: the hashes agree again afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpcompile.emit.manifest_text import sealed
from qpcompile.files import sha256

MANIFEST = "manifest.json"


def read(folder: Path, name: str) -> Any:
    """The content of a JSON file of the folder."""
    return json.loads((folder / name).read_text())


def replace(folder: Path, name: str, data: bytes | str) -> None:
    """Replace a file by one with other bytes: hard links to the old file keep its content."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def rehash(folder: Path, **changes: Any) -> None:
    """Give the manifest the hashes of the files that are there, and `changes`."""
    content = read(folder, MANIFEST) | changes
    content.pop("digest", None)
    for name, entry in content["files"].items() if isinstance(content.get("files"), dict) else ():
        path = folder / name
        if isinstance(entry, dict) and path.is_file() and os.access(path, os.R_OK):
            entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    replace(folder, MANIFEST, sealed(content))


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file; `change` returns the new value, or edits the old one and returns None."""
    data = read(folder, name)
    new = change(data)
    replace(folder, name, json.dumps(data if new is None else new, indent=2))
    rehash(folder)
