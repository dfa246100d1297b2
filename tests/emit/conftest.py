"""One captured program for all tests of what is emitted: tracing takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.emit.compiled import CompiledVLM
from qpcompile.recipe import Recipe
from tests.families import llava


@pytest.fixture(scope="session")
def tiny_llava() -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """A random model and its prompts by name."""
    return llava()


@pytest.fixture(scope="session")
def compiled_llava(tiny_llava: tuple[Any, dict[str, dict[str, torch.Tensor]]]) -> CompiledVLM:
    """The same model captured with the recipe `none`; do not change it."""
    model, cases = tiny_llava
    return CompiledVLM(capture(model, cases["one"], Recipe.load("none")))
