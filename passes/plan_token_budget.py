"""Compute the token schedule: after which layers visual tokens are dropped, and how many are kept.

The method (pruning/methods) defines where and in which proportions; `tokens.keep` and `tokens.keep_of` define how many:

    keep_of final    the ratio after the last cut is `keep`
    keep_of mean     the mean over decoder layers is `keep`, found by bisection, so that methods can be compared

Source: "QUOTA" (arXiv 2604.17320), section 3.2, equations 2 to 5, for its own schedule; matching means is ours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from qpcompile.ir.program import PREFILL, Program
from qpcompile.pruning.budget import ratio_fraction
from qpcompile.pruning.mean import final_keep
from qpcompile.pruning.states import find_states, states_schedule
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.plan import Cut
from qpcompile.stages import Stage

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanTokenBudget:
    """See the module's docstring. Fills the plan; the graphs are unchanged."""

    name: ClassVar[str] = "plan_token_budget"
    purpose: ClassVar[str] = (
        "Compute the token schedule: after which layers visual tokens are dropped, and how many are kept."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "planned"

    def run(self, program: Program) -> bool:
        """Returns False: nothing in the graphs changes."""
        tokens = program.recipe.tokens
        if tokens.method == "none":
            return False
        states = find_states(program.graphs[PREFILL])
        schedule = PRUNERS[tokens.method].schedule(program) if states is None else states_schedule(program, states)
        depth = len(program.layers)
        keep = tokens.keep if tokens.keep_of == "final" else final_keep(schedule, tokens.keep, depth)
        scores = schedule.scores or (None,) * len(schedule.layers)
        path = None if states is None else str(states.path)
        cuts = [
            Cut(layer=layer, ratio=ratio, numerator=numerator, denominator=denominator, score=score, states=path)
            for layer, ratio, score in zip(schedule.layers, schedule.ratios(keep), scores, strict=True)
            for numerator, denominator in [ratio_fraction(ratio)]
            if numerator < denominator
        ]
        for condition in schedule.waived:
            text = "no layer meets all conditions of tokens.candidate_layers auto; waived: %s"
            _LOG.warning(text if states is None else "left out of the token budget: %s", condition)
        program.plan = program.plan.changed(
            candidate_layers=tuple(layer for layer in schedule.layers if layer >= 0),
            waived=schedule.waived,
            sensitivity=schedule.sensitivity,
            cuts=tuple(cuts),
        )
        return False
