"""A compiler for vision-language models: 4-bit quantization and visual-token pruning, chosen together."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpcompile.compiled import CompiledVLM, load, register_with_transformers
    from qpcompile.errors import QPCompileError
    from qpcompile.pipeline import compile
    from qpcompile.recipe.plan import Plan
    from qpcompile.recipe.recipe import Recipe

__all__ = ["CompiledVLM", "Plan", "QPCompileError", "Recipe", "compile", "load", "register_with_transformers"]

# Imported lazily: torch and transformers take seconds to import, and many commands need neither.
_HOMES = {
    "CompiledVLM": "qpcompile.compiled",
    "Plan": "qpcompile.recipe.plan",
    "QPCompileError": "qpcompile.errors",
    "Recipe": "qpcompile.recipe.recipe",
    "compile": "qpcompile.pipeline",
    "load": "qpcompile.compiled",
    "register_with_transformers": "qpcompile.compiled",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
