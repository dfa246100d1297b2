"""The residual cue against what the next layer's first quantizer loses, in the quantized graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import captured, changed_recipe, fresh
from torch import Tensor, fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import is_call, layer_of
from qpcompile.ir.operators import QUANTIZE_DYNAMIC, SELECT_TOKENS, TOKEN_SCORES
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, Graph
from qpcompile.kernels.quantize_dynamic.reference import dequantize
from qpcompile.pass_list import passes
from qpcompile.runtime.machine import Machine

# All tokens but one of 16 stay: the quantizer behind the cut then sees nearly all that were scored.
KEYS = (
    "tokens.candidate_layers=[0]",
    "tokens.keep=0.93",
    "tokens.weights={inter: 0.0, magnitude: 0.0, intra: 0.0, residual: 1.0}",
    "tokens.normalize=rank",
)
RECIPES = {
    "learned": ("quantize.transform=flatquant", "quantize.training.epochs=1"),
    "rotated, groups": ("quantize.transform=hadamard", "quantize.activations.group_size=16"),
    "neither": ("quantize.transform=none", "quantize.center=null", "quantize.activations.clip_ratio=0.8"),
}


class Watch(fx.Interpreter):
    """Keeps the values of scores, selection, and the first quantizer of layer 1."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.seen: dict[object, tuple[tuple[Any, ...], Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_call(n, TOKEN_SCORES, SELECT_TOKENS, QUANTIZE_DYNAMIC):
            behind = n.target is not QUANTIZE_DYNAMIC or layer_of(n) == 1
            if behind and n.target not in self.seen:
                self.seen[n.target] = self.fetch_args_kwargs_from_env(n)[0], value
        return value


def correlation(*settings: str) -> float:
    """Spearman's, over the visual tokens that stay."""
    _, cases, _ = captured()
    program = fresh(changed_recipe("quota-30", *KEYS, *settings))
    listed = passes([cases["one"], cases["longer"]], 2)
    names = [item.name for item in listed]
    run_passes(program, listed[: names.index("fuse_kernels")])
    found: list[Watch] = []

    def execute(graph: Graph, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        if graph.name != PREFILL:
            return graph(feeds)
        found.append(watch := Watch(graph))
        return dict(zip(graph.outputs, watch.run(*feeds.values()), strict=True))

    with torch.no_grad(), Machine(program, execute) as machine:
        machine.prefill(cases["longer"])
        visual = machine.visual
    seen = found[0].seen
    assert visual is not None
    index = seen[SELECT_TOKENS][1][0]
    marks = visual.gather(1, index)[0]
    cue = seen[TOKEN_SCORES][1].gather(1, index)[0][marks]
    (x, *_), (codes, scale) = seen[QUANTIZE_DYNAMIC]
    lost = (dequantize(codes, scale) - x.float()).norm(dim=-1)[0][marks]
    assert len(lost) > 10
    ranks = torch.stack([each.argsort().argsort().double() for each in (cue, lost)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("name", ["learned", pytest.param("neither", marks=pytest.mark.slow), "rotated, groups"])
def test_the_cue_is_what_is_rounded(name: str) -> None:
    assert correlation(*RECIPES[name]) >= 0.95


@pytest.mark.slow
def test_the_stream_is_another_cue() -> None:
    assert correlation(*RECIPES["learned"], "tokens.residual_of=stream") < 0.95


def test_a_rotation_that_the_quantizer_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="can only be rotated"):
        correlation("quantize.transform=none", "tokens.residual_of=stream", "tokens.residual_space=transformed")
