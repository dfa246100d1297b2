"""The stage-wise orders plan without the quantizer: equal drops, no residual in the score."""

from __future__ import annotations

import pytest
import torch
from programs import captured, changed_recipe, fresh

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.edit import calls
from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, Program
from qpcompile.pass_list import passes
from qpcompile.pruning.budget import DEVIATIONS


def planned(order: str) -> Program:
    """The captured LLaVA through every pass up to the cuts, and the one that recalibrates."""
    _, cases, _ = captured()
    keys = ("tokens.candidate_layers=[0, 1]", "tokens.keep=0.5", f"order={order}")
    program = fresh(changed_recipe("quota-30", *keys))
    names = [item.name for item in passes([cases["one"]], 1)]
    run_passes(program, passes([cases["one"]], 1)[: names.index("recalibrate") + 1])
    return program


def score_weights(program: Program) -> list[list[float]]:
    """The weights of the score's terms at each cut."""
    found = []
    for node in calls(program.graphs[PREFILL], TOKEN_SCORES):
        lists = [argument for argument in node.args if isinstance(argument, (list, tuple)) and len(argument) == 4]
        found.append([float(number) for number in lists[0]])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("order", ["quantize_then_prune", "prune_then_quantize"])
def test_stage_wise_orders_leave_the_quantizer_out(order: str) -> None:
    program = planned(order)
    ratios = [cut.ratio for cut in program.plan.cuts]
    assert ratios == pytest.approx([0.75, 0.5])
    assert all(weights[3] == 0.0 and sum(weights) > 0 for weights in score_weights(program))
    deviations = torch.tensor(list(program.measured[DEVIATIONS].values()))
    assert bool((deviations == 0).all()) == (order == "prune_then_quantize")
    tokens = {site.tokens for name, site in program.measured[CALIBRATION].inputs.items() if "language_model" in name}
    assert (len(tokens) > 1) == (order == "prune_then_quantize"), "statistics behind the cuts"


def test_joint_plans_with_the_quantizer() -> None:
    program = planned("joint")
    ratios = [cut.ratio for cut in program.plan.cuts]
    assert ratios[1] == pytest.approx(0.5) and abs(ratios[0] - 0.75) > 1e-3
    assert all(weights[3] > 0 for weights in score_weights(program))
