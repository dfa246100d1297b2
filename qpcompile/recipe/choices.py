"""Values of recipe keys that are names of files: adding the file adds the value, and no list names it.

    tokens.method              qpcompile/pruning/methods/<method>.py
    quantize.weights.solver    qpcompile/quantization/solvers/<solver>.py

Names are listed without importing the files, which need torch: a recipe is checked before anything is loaded.
"""

import pkgutil
from importlib import resources
from typing import TYPE_CHECKING, Literal


def file_names(folder: str) -> tuple[str, ...]:
    """The names of the modules in a folder of the package, e.g. `pruning/methods`, sorted."""
    path = resources.files("qpcompile") / folder
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(path)])))


METHODS = file_names("pruning/methods")
SOLVERS = file_names("quantization/solvers")

# A type checker cannot read the folders: to it, a name is text.
if TYPE_CHECKING:
    Method = Solver = str
else:
    Method = Literal[("none", *METHODS)]
    Solver = Literal[SOLVERS]
