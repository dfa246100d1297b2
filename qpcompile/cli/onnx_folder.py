"""Ask an ONNX folder from the command line, with this package's runner: the folder's own is not executed."""

from __future__ import annotations

from pathlib import Path

import typer
from PIL import Image

from qpcompile.errors import ArtifactError, ExportError


def stream_answer(folder: Path, picture: Image.Image, question: str, max_new_tokens: int) -> None:
    """Print the greedy answer as it comes. Raises ArtifactError for a folder or a question that cannot be taken."""
    try:
        # Imported here because onnxruntime is an optional dependency.
        from qpcompile.emit.onnx.runner.answer import Runner
        from qpcompile.emit.onnx.runner.folder import RunnerError
    except ModuleNotFoundError as error:
        raise ExportError(
            f"the package {error.name} is not installed",
            where=str(folder),
            do='install the extra: pip install "qpcompile[onnx]"',
        ) from error
    try:
        begun = False
        for part in Runner(folder).stream(picture, question, max_new_tokens=max_new_tokens, temperature=0):
            part = part if begun else part.lstrip()
            begun = begun or bool(part)
            typer.echo(part, nl=False)
        typer.echo()
    except RunnerError as error:
        raise ArtifactError(error.what, where=error.where, do=error.do) from error
