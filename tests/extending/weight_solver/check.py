"""The solver `floor` quantizes a program whose recipe names it; it needs no samples, and the reference lists it."""

from __future__ import annotations

import torch
from extending.recipe_reference import recipe_page
from programs import changed_recipe, stubbed, traced

from qpcompile.ir.edit import get_tensor
from qpcompile.kernels.linear_int.packing import unpack_int4
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.pipeline import needs_samples


class Single(torch.nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = torch.nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


settings = ("quantize.weights.solver=floor", "quantize.weights.clip_search=false", "quantize.ignore=[]")
recipe = changed_recipe("w4a16", "quantize.transform=none", *settings)
graph = traced(Single(), {"x": torch.ones(2, 3, 16)})
weight = get_tensor(graph.module, "proj.weight").detach().clone()
assert QuantizeWeights().run(stubbed(graph, recipe=recipe))
codes = unpack_int4(get_tensor(graph.module, "proj.weight_packed"), 16)
scale = weight.abs().amax(1, keepdim=True) / 7
assert torch.equal(codes, (weight / scale).floor().clamp(-8, 7).to(codes.dtype))

assert not any("solver" in need for need in needs_samples(recipe))
assert "| `floor` | Round down: q = clamp(floor(w / s), -8, 7). |" in recipe_page()
