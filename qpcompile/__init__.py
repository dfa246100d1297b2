"""A compiler for vision-language models: 4 bits and the visual tokens to keep, chosen together."""

from qpcompile.emit.compiled import CompiledVLM, load
from qpcompile.errors import QPCompileError
from qpcompile.pipeline import compile
from qpcompile.plan import Plan
from qpcompile.recipe import Recipe

__all__ = ["CompiledVLM", "Plan", "QPCompileError", "Recipe", "compile", "load"]
