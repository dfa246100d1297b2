"""One captured program for all tests of the emitters: tracing takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.ir.pass_manager import run_passes
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.recipe.recipe import Recipe
from tests.families import llava


@pytest.fixture(scope="session")
def tiny_llava() -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """A random model and its prompts by name."""
    return llava()


@pytest.fixture(scope="session")
def compiled_llava(tiny_llava: tuple[Any, dict[str, dict[str, torch.Tensor]]]) -> CompiledVLM:
    """The same model compiled by the recipe `none`; do not change it."""
    model, cases = tiny_llava
    program = capture(model, cases["one"], Recipe.load("none"))
    run_passes(program, [Canonicalize()])
    return CompiledVLM(program)


@pytest.fixture(scope="session")
def plain(compiled_llava: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of that model, nothing quantized, nothing cut; do not change it."""
    folder = tmp_path_factory.mktemp("onnx") / "plain"
    export_onnx(compiled_llava.program, folder)
    return folder
