"""Distinguish an exported ONNX folder from an artifact: both contain a manifest.json."""

from __future__ import annotations

from pathlib import Path

from qpcompile.errors import ArtifactError


def refuse_onnx_folder(folder: Path) -> None:
    """Raise ArtifactError if the folder is an ONNX export instead of a compiled model."""
    if (folder / "prefill.onnx").is_file():
        raise ArtifactError(
            "this is an ONNX folder, not a compiled model",
            where=str(folder),
            do=f"run it with python {folder / 'runner.py'}, or name the folder it was exported from",
        )
