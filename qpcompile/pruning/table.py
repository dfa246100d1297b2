"""All pruning methods by their names in recipes: a method is the file of its name in methods/."""

from __future__ import annotations

from importlib import import_module

from qpcompile.errors import RecipeError
from qpcompile.ir.operators import PIVOT_TOKENS
from qpcompile.pruning.pruner import Configurable, Particular, Pruner, RiskFuser, options_of
from qpcompile.recipe.choices import METHODS
from qpcompile.recipe.quantize import Section
from qpcompile.recipe.recipe import Recipe


def read_methods() -> dict[str, Pruner]:
    """METHOD of each file, by the file's name."""
    return {name: import_module(f"qpcompile.pruning.methods.{name}").METHOD for name in METHODS}


PRUNERS: dict[str, Pruner] = read_methods()


class NoOptions(Section):
    """The options of a method that has no keys of its own."""


def check_method(recipe: Recipe) -> None:
    """Raise RecipeError for options and settings that the recipe's pruning method does not take, before anything is
    measured.
    """
    method = PRUNERS.get(recipe.tokens.method)
    options_of(method.options if isinstance(method, Configurable) else NoOptions, recipe)
    if isinstance(method, Particular):
        method.check(recipe)
    centers = recipe.quantize is not None and recipe.quantize.kv_cache.center
    if centers and method is not None and PIVOT_TOKENS in method.operators:
        raise RecipeError(
            f"the method {recipe.tokens.method} chooses tokens by the norms of their keys, which centring changes",
            where="quantize.kv_cache.center",
            do="write false, or choose another tokens.method",
        )
    if recipe.tokens.risk.fuse and not isinstance(method, RiskFuser):
        able = ", ".join(name for name, each in PRUNERS.items() if isinstance(each, RiskFuser))
        raise RecipeError(
            f"the method {recipe.tokens.method} cannot fuse the risk into its score",
            where="tokens.risk.fuse",
            do=f"write false, or choose one of {able}",
        )
