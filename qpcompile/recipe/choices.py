"""Values of recipe keys that are names of files: adding the file adds the value, and no list names it.

    tokens.method    qpcompile/pruning/methods/<method>.py

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

# A type checker cannot read the folder: to it, a name is text.
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[("none", *METHODS)]
