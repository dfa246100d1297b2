"""Search a clip ratio for each quantized input: the one with the least output error of its linears.

    min over r of  mean over tokens of || W (Q_r(x) - x) ||^2,   scale of Q_r = r max|x| / h,  h = 7 or 127

Visual and text tokens of the calibration are averaged separately, and the two means are added. A smaller quantization
step for most channels outweighs the error of the few that are clipped. The ratio is stored in the stub's fact, and from
there in `qpcompile::quantize_dynamic`; it costs nothing at run time.

Source: FlatQuant's learned activation clipping (arXiv 2410.09426, section 3.1), but by search instead of gradients, as
AWQ does for weights (arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.node_facts import StubFact, set_fact, stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import Graph, Program
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.products import rows_of
from qpcompile.quantization.rounding_error import RATIOS, rounding_errors
from qpcompile.quantization.site_bits import inputs_at
from qpcompile.recipe.quantize import ActivationScheme
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage


@dataclass(frozen=True)
class SearchClips:
    """See the module's docstring."""

    name: ClassVar[str] = "search_clips"
    purpose: ClassVar[str] = (
        "Search a clip ratio for each quantized input: the one with the least output error of its linears."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `clip` in the facts of activation stubs; the graphs are unchanged."""
        scheme = program.recipe.quantize
        if scheme is None or not scheme.activations.clip_search or 16 in (scheme.weights.bits, scheme.activations.bits):
            return False
        inputs, on = program.measured[CALIBRATION].inputs, Placement.of(program)
        stubs: dict[str, list[tuple[Graph, fx.Node, StubFact]]] = {}
        for graph in program.graphs.values():
            for stub in calls(graph, QUANT_STUB):
                fact = stub_fact(stub)
                if fact is not None and fact.role == "activation" and fact.site in inputs and fact.clip is None:
                    stubs.setdefault(fact.site, []).append((graph, stub, fact))

        def names(site: str) -> list[str]:
            return [weight_name(linear) for linear in stubs[site][0][1].users]

        def size(site: str) -> int:
            return sum(get_tensor(stubs[site][0][0].module, name).numel() for name in names(site))

        def search(site: str) -> float:
            graph, _, fact = stubs[site][0]
            weights = [rows_of(on.weight(graph.module, name).detach()) for name in names(site)]
            return best_clip(inputs[site].to(on.device), torch.cat(weights), inputs_at(fact, scheme))

        for site, clip in program.ranks.spread(stubs, size, search):
            for _, stub, fact in stubs[site]:
                set_fact(stub, replace(fact, clip=clip))
        return False


def best_clip(statistics: InputStatistics, weights: torch.Tensor, scheme: ActivationScheme) -> float:
    """weights: f[N, C] -> the ratio of RATIOS with the least output error, ties to the largest."""
    costs = rounding_errors(statistics, weights, scheme, RATIOS)
    return RATIOS[min(range(len(RATIOS)), key=costs.__getitem__)]
