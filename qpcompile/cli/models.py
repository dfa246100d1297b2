"""The models that commands work on: compiled on the spot, or opened from a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpcompile.capture.chat import need_processor
from qpcompile.cli import terminal
from qpcompile.emit.artifact.folder_kind import refuse_onnx_folder
from qpcompile.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from qpcompile.compiled import CompiledVLM
    from qpcompile.ir.pass_manager import PassRun
    from qpcompile.ir.program import Program
    from qpcompile.ranks import Ranks


def checked_device(device: str | None) -> torch.device | None:
    """The device that `--device` names, if torch can compute there. Raises KernelError, before anything is loaded."""
    if device is None:
        return None
    from qpcompile.runtime.placement import compute_device

    return compute_device(device)


def compile_told(
    model: str,
    recipe: Recipe,
    data: Path | None,
    resume: Path | None = None,
    device: str | None = None,
    offload: Path | None = None,
    ranks: Ranks | None = None,
) -> CompiledVLM:
    """Compile, reporting each pass on stderr; of several ranks only rank 0 reports."""
    terminal.quiet_libraries()
    from qpcompile.pipeline import compile

    started = time.monotonic()

    def after(step: PassRun, program: Program) -> None:
        if program.ranks.leads:
            terminal.note(
                f"{time.monotonic() - started:7.1f} s  {step.name}: {'done' if step.modified else 'graphs unchanged'}"
            )

    return compile(
        model,
        recipe,
        calibration=data,
        after=after,
        resume=resume,
        device=device,
        offload=offload,
        ranks=ranks,
    )


def load_artifact(folder: str | Path) -> CompiledVLM:
    """The compiled model in a folder, or of that name on the hub."""
    terminal.quiet_libraries()
    from qpcompile.compiled import load

    return load(str(folder))


def is_artifact(source: str | Path) -> bool:
    """Whether a folder looks like an artifact, even a damaged one."""
    folder = Path(source)
    refuse_onnx_folder(folder)
    return (folder / "manifest.json").is_file() or (folder / "graph").is_dir()


def open_model(source: str) -> tuple[Any, Any]:
    """(object with `generate`, processor) of a compiled folder or of a transformers model."""
    if not is_artifact(source):
        terminal.quiet_libraries()
        from qpcompile.capture.load import load_model

        return load_model(source)
    compiled = load_artifact(source)
    return compiled, need_processor(compiled.processor, source)
