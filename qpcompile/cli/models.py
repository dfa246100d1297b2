"""Models of commands: compiled with progress on stderr, loaded, or opened whichever they are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpcompile.cli.terminal import note, quiet_libraries
from qpcompile.emit.artifact.folder_kind import refuse_onnx_folder
from qpcompile.errors import ArtifactError
from qpcompile.recipe.recipe import Recipe

if TYPE_CHECKING:
    from qpcompile.compiled import CompiledVLM
    from qpcompile.ir.pass_manager import PassRun
    from qpcompile.ir.program import Program


def compile_told(model: str, recipe: Recipe, data: Path | None, resume: Path | None = None) -> CompiledVLM:
    """Compile, reporting each pass on stderr."""
    quiet_libraries()
    from qpcompile.pipeline import compile

    started = time.monotonic()

    def after(step: PassRun, program: Program) -> None:
        note(f"{time.monotonic() - started:7.1f} s  {step.name}: {'done' if step.modified else 'graphs unchanged'}")

    return compile(model, recipe, calibration=data, after=after, resume=resume)


def load_artifact(folder: str | Path) -> CompiledVLM:
    """The compiled model in a folder."""
    quiet_libraries()
    from qpcompile.compiled import load

    return load(folder)


def is_artifact(source: str | Path) -> bool:
    """Whether a folder looks like an artifact, even a damaged one."""
    folder = Path(source)
    refuse_onnx_folder(folder)
    return (folder / "manifest.json").is_file() or (folder / "graph").is_dir()


def open_model(source: str) -> tuple[Any, Any]:
    """(object with `generate`, processor) of a compiled folder or of a transformers model."""
    if not is_artifact(source):
        quiet_libraries()
        from qpcompile.capture.load import load_model

        return load_model(source)
    compiled = load_artifact(source)
    return compiled, need_processor(compiled.processor, source)


def need_processor(processor: Any, source: str | Path) -> Any:
    """The processor, or an error that explains how a compiled model gets one."""
    if processor is None:
        raise ArtifactError(
            "the compiled model has no processor, so pictures and questions cannot be turned into inputs",
            where=str(source),
            do="compile with processor=..., or from the folder of a model that has one",
        )
    return processor
