"""The keys for what QUOTA's paper leaves open, one by one, against the tiny LLaVA itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import IMAGE
from programs import captured, changed_recipe, fresh
from torch import Tensor

from qpcompile.ir.edit import aten, calls
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, Program
from qpcompile.kernels.token_scores.reference import residual
from qpcompile.pass_list import passes
from qpcompile.runtime.machine import Machine

CUTS = ("tokens.candidate_layers=[0, 1]", "tokens.keep=0.4")
ONLY_RESIDUAL = "tokens.weights={inter: 0.0, magnitude: 0.0, intra: 0.0, residual: 1.0}"
NO_RESIDUAL = "tokens.weights={inter: 0.5, magnitude: 0.3, intra: 0.2, residual: 0.0}"


def compiled(preset: str, *settings: str) -> Program:
    _, cases, _ = captured()
    program = fresh(changed_recipe(preset, *settings))
    run_passes(program, passes([cases["one"], cases["longer"]], 2))
    return program


def kept(program: Program, case: str = "longer") -> dict[int, list[list[int]]]:
    _, cases, _ = captured()
    return {layer: index.tolist() for layer, index in Machine(program).prefill(cases[case]).kept.items()}


def normed_input(layer: int) -> Tensor:
    """The input of a layer's projections for the prompt "longer", f32[S, C], by transformers."""
    model, cases, _ = captured()
    found: list[Tensor] = []
    language: Any = model.get_submodule("model.language_model")
    handle = language.layers[layer].input_layernorm.register_forward_hook(lambda _, __, out: found.append(out[0]))
    with torch.no_grad():
        model(**cases["longer"])
    handle.remove()
    return found[0]


@pytest.mark.parametrize("relative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_residual_of_what_the_next_layer_rounds(relative: bool) -> None:
    _, cases, _ = captured()
    keys = ("tokens.candidate_layers=[0]", "tokens.method=quota", "tokens.keep=0.4", "tokens.residual_of=input")
    program = compiled(
        "none", *keys, ONLY_RESIDUAL, f"tokens.residual_relative={str(relative).lower()}", "tokens.normalize=rank"
    )
    lost = residual(normed_input(1)[None], False, 0, 1.0, 4, relative)[0]
    visual = (cases["longer"]["input_ids"][0] == IMAGE).nonzero().flatten()
    count = program.plan.cuts[0].kept(len(visual))
    expected = visual[lost[visual].topk(count).indices].sort().values.tolist()
    assert [each for each in kept(program)[0][0] if each in visual.tolist()] == expected
    stream = compiled("none", *keys[:3], ONLY_RESIDUAL, "tokens.normalize=rank", "tokens.residual_of=stream")
    assert kept(stream) != kept(program), "the stream loses elsewhere than what is read of it"


@pytest.mark.slow
def test_full_precision_scores_choose_as_without_a_quantizer() -> None:
    language = "quantize.scope=[language]"
    ratios = ("tokens.schedule=uniform", NO_RESIDUAL, *CUTS)
    plain = compiled("none", "tokens.method=quota", *ratios)
    full = compiled("quota-30", language, "tokens.scores_of=full_precision", *ratios)
    deployed = compiled("quota-30", language, *ratios)
    for case in ("longer", "padded"):
        assert kept(full, case) == kept(plain, case)
    assert any(kept(deployed, case) != kept(plain, case) for case in ("one", "longer", "padded", "pictures"))
    # The decoder itself stays quantized; layers 0 and 1 run a second time without quantization.
    graph = full.graphs[PREFILL]
    assert len(list(calls(graph, LINEAR_INT))) == len(list(calls(deployed.graphs[PREFILL], LINEAR_INT))) == 12
    assert len(list(calls(graph, aten.linear.default))) == 2 * 7


@pytest.mark.slow
def test_a_uniform_schedule_drops_equally() -> None:
    program = compiled("quota-30", "tokens.schedule=uniform", *CUTS)
    assert [round(cut.ratio, 6) for cut in program.plan.cuts] == [0.7, 0.4]
    by_sensitivity = compiled("quota-30", *CUTS)
    assert [cut.ratio for cut in by_sensitivity.plan.cuts] != [cut.ratio for cut in program.plan.cuts]
