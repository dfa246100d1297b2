"""All pruning methods by their names in recipes: METHODS of each file in methods/."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import qpcompile.pruning.methods as methods
from qpcompile.pruning.pruner import Pruner


def read_methods() -> dict[str, Pruner]:
    """The methods of all files, sorted by file."""
    names = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    modules = [import_module(f"{methods.__name__}.{name}") for name in names]
    return {name: pruner for module in modules for name, pruner in module.METHODS.items()}


PRUNERS: dict[str, Pruner] = read_methods()
