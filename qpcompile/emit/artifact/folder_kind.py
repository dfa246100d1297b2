"""Distinguish an exported ONNX folder from an artifact: both contain a manifest.json."""

from __future__ import annotations

from pathlib import Path

from qpcompile.errors import ArtifactError


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder looks like an ONNX export, even a damaged one."""
    return (folder / "prefill.onnx").is_file()


def refuse_onnx_folder(folder: Path) -> None:
    """Raise ArtifactError if the folder is an ONNX export instead of a compiled model."""
    if is_onnx_folder(folder):
        raise ArtifactError(
            "this is an ONNX folder, not a compiled model",
            where=str(folder),
            do=f"ask it with python {folder / 'runner.py'} or qpcompile run, or name the folder it was exported from",
        )
