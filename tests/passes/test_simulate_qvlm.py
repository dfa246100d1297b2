"""Q-VLM's quantizer as a simulation: marked as such, in floating point, and refused by the ONNX export."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import changed_recipe, run, stubbed, traced
from torch import nn
from toy_decoder import HIDDEN, decode_graph, prefill_graph

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.operators import LINEAR_INT, SIMULATE_QVLM
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.kernels.simulate_qvlm.reference import nf4, simulate_qvlm
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.passes.simulate_qvlm import SimulateQvlm
from qpcompile.recipe.recipe import Recipe

Apply = Callable[[Program, SimulateQvlm], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


class Two(nn.Module):
    """Two linears on one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def recipe(*settings: str) -> Recipe:
    keys = ("quantize.simulation=qvlm", "quantize.transform=none", "quantize.smooth=null", "quantize.ignore=[]")
    return changed_recipe("w4a4kv4", *keys, *settings)


def test_golden(apply: Apply) -> None:
    graph = traced(Two(), TOKENS)
    assert apply(stubbed(graph, recipe=recipe()), SimulateQvlm())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# first
@simulated.model_first_low : f32[8]
@simulated.model_first_high : f32[8]
%1 = qpcompile::simulate_qvlm(%0, @simulated.model_first_low, @simulated.model_first_high) : f32[B, S0, 8]
@first.weight : f32[3, 8]
@first.bias : f32[3]
%2 = aten::linear(%1, @first.weight, @first.bias) : f32[B, S0, 3]
# second
@second.weight : f32[3, 8]
%3 = aten::linear(%1, @second.weight) : f32[B, S0, 3]
# top
%4 = aten::add.Tensor(%2, %3) : f32[B, S0, 3]
return y = %4
""",
    )


def test_numbers() -> None:
    module, graph = Two(), traced(Two(), TOKENS)
    program = stubbed(graph, recipe=recipe())
    (statistics,) = program.measured[CALIBRATION].inputs.values()
    SimulateQvlm().run(program)
    given = simulate_qvlm(TOKENS["x"], statistics.rows.amin(dim=0), statistics.rows.amax(dim=0))
    expected = given @ nf4(module.first.weight).T + module.first.bias + given @ nf4(module.second.weight).T
    assert torch.allclose(run(graph, **TOKENS)["y"], expected, atol=1e-5)
    assert not torch.allclose(expected, module(TOKENS["x"]), atol=1e-2)


def test_sites_say_that_it_is_a_simulation_and_nothing_is_packed(apply: Apply) -> None:
    program = stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe(), layers=2)
    assert apply(program, SimulateQvlm())
    program.stage = "cut"
    assert not QuantizeWeights().run(program)
    assert all(site.kernel.startswith("simulation") for site in program.plan.sites)
    assert len(program.plan.sites) == 2 * 2 * 7
    for name in (PREFILL, DECODE):
        assert list(calls(program.graphs[name], SIMULATE_QVLM)) and not list(calls(program.graphs[name], LINEAR_INT))
    weight = "layers.1.mlp.up_proj.weight"
    assert torch.equal(*(get_tensor(program.graphs[name].module, weight) for name in (PREFILL, DECODE)))


def test_nothing_to_do(apply: Apply) -> None:
    assert not apply(stubbed(traced(Two(), TOKENS), recipe=recipe("quantize.simulation=none")), SimulateQvlm())


def test_unknown_ranges_are_refused() -> None:
    program = stubbed(traced(Two(), TOKENS), recipe=recipe())
    program.measured[CALIBRATION].inputs.clear()
    with pytest.raises(CalibrationError, match="ranges of an input"):
        SimulateQvlm().run(program)
