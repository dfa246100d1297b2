"""The key `quantize.weights.headroom` is checked, listed and read; without it nothing changes."""

from __future__ import annotations

import torch
from extending.recipe_reference import recipe_page

from qpcompile.errors import RecipeError
from qpcompile.quantization.solve import solve
from qpcompile.recipe.recipe import Recipe

plain = Recipe.load("w4a16")
wide = plain.with_overrides(["quantize.weights.headroom=1.5"])
assert Recipe.from_yaml(wide.to_yaml()) == wide != plain
try:
    plain.with_overrides(["quantize.weights.headroom=0.5"])
except RecipeError as error:
    assert "quantize.weights.headroom: given 0.5; allowed: number >= 1 and <= 2" in error.what
else:
    raise AssertionError("a value beyond the bounds is let through")
assert "| `headroom` | number, \u2265 1, \u2264 2 | `1.0` | Factor of every scale. |" in recipe_page()

weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
assert plain.quantize is not None and wide.quantize is not None
(_, before), (_, after) = (solve(weight, None, scheme.weights) for scheme in (plain.quantize, wide.quantize))
assert torch.equal(after, before * 1.5)
