"""The command `export --for compressed-tensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpcompile.claims import claimed
from qpcompile.cli import terminal
from qpcompile.cli.models import checked_device, compile_told, is_artifact, load_artifact
from qpcompile.emit.compressed.recipes import FORMAT, refuse_recipe
from qpcompile.recipe.recipe import Recipe
from qpcompile.write_errors import shown

COMPRESSED = FORMAT
Target = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Who reads it: onnxruntime, web, genai, openvino or tensorrt; or compressed-tensors, a checkpoint for "
        "vLLM, SGLang and transformers.",
        show_default=False,
    ),
]


def export(source: str, output: Path, recipe: Recipe, data: Path | None, device: str | None, fast: bool) -> None:
    """Write the checkpoint of a compiled folder, or of a model that is compiled first. A recipe is refused before."""
    if fast:
        raise typer.BadParameter("it chooses operators of onnxruntime", param_hint="--fast")
    with claimed(output, "folder") as folder:
        if is_artifact(source):
            compiled = load_artifact(source)
        else:
            refuse_recipe(recipe)
            checked_device(device)
            compiled = compile_told(source, recipe, data, device=device)
        compiled.export_compressed_tensors(folder)
    terminal.note(f"wrote {shown(output)}; how to load it: {shown(output)}/README.md")
