"""Where `numerics: exact` can be kept: float64 sums on a CPU, for models in float32 or wider."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qpcompile.errors import RecipeError
from qpcompile.recipe.recipe import Recipe


def check_numerics(recipe: Recipe, tensors: Iterable[torch.Tensor]) -> None:
    """Raise RecipeError if the recipe asks for exact numerics of a model with one of these weights."""
    if recipe.numerics == "fast":
        return
    for tensor in tensors:
        half = tensor.is_floating_point() and tensor.element_size() < 4
        if half or tensor.device.type != "cpu":
            what = f"in {str(tensor.dtype).removeprefix('torch.')}" if half else f"on {tensor.device}"
            raise RecipeError(
                f"numerics: exact sums in float64 and rounds to float32 once, and this model is {what}",
                where="numerics",
                do="compile and run the model in float32 on the CPU, or ask for numerics: fast",
            )
