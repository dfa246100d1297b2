"""The text of a manifest, of an artifact or an ONNX folder: JSON with the digest of everything else in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Defined by the runner, which is written beside ONNX graphs and imports nothing of this package.
from qpcompile.emit.onnx.runner.folder import digest

__all__ = ["digest", "sealed"]


def sealed(content: Mapping[str, Any]) -> str:
    """The text of a manifest with this content, and its digest as the last key."""
    return json.dumps({**content, "digest": digest(content)}, indent=2) + "\n"
