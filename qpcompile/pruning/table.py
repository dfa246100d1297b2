"""All pruning methods by their names in recipes: a method is the file of its name in methods/."""

from __future__ import annotations

from importlib import import_module

from qpcompile.pruning.pruner import Pruner
from qpcompile.recipe.choices import METHODS


def read_methods() -> dict[str, Pruner]:
    """METHOD of each file, by the file's name."""
    return {name: import_module(f"qpcompile.pruning.methods.{name}").METHOD for name in METHODS}


PRUNERS: dict[str, Pruner] = read_methods()
