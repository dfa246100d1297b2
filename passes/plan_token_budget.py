"""Decide behind which layers visual tokens are dropped and how many stay: the materialised pruning recipe.

Source: "QUOTA" (arXiv 2604.17320), section 3.2, equations 2 to 5; the candidate rule's thresholds are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpcompile.errors import PlanError
from qpcompile.ir.budget import candidate_layers, plan_budget, sensitivity
from qpcompile.ir.program import Program
from qpcompile.plan import Cut, Sensitivity


@dataclass(frozen=True)
class PlanTokenBudget:
    """See the module's docstring. Fills the plan; the graphs stay as they are."""

    name: ClassVar[str] = "plan_token_budget"
    needs: ClassVar[str] = "calibrated"
    gives: ClassVar[str] = "planned"

    def run(self, program: Program) -> bool:
        """Returns False: nothing in the graphs changes."""
        tokens = program.recipe.tokens
        if tokens.method == "none":
            return False
        if tokens.position_mode != "retain":
            raise PlanError(
                f"position_mode {tokens.position_mode} has no implementation: kept tokens keep their positions",
                where="tokens.position_mode",
                do="write retain",
            )
        chosen = _candidates(program)
        # Without samples all layers count as equally sensitive.
        deviations = program.facts.get("deviations", {layer: [0.0] for layer in chosen})
        table = [list(sample) for sample in zip(*[deviations[layer] for layer in chosen], strict=True)]
        budgets = plan_budget(
            chosen,
            sensitivity(table),
            tokens.keep,
            tokens.temperature,
            tokens.sensitivity_percentiles,
            tokens.sensitivity_clip,
        )
        found = [Sensitivity(layer=b.layer, raw=b.sensitivity, normalized=b.normalized) for b in budgets]
        cuts = [
            Cut(layer=b.layer, ratio=b.ratio, numerator=b.numerator, denominator=b.denominator)
            for b in budgets
            if b.numerator < b.denominator
        ]
        program.plan = program.plan.changed(candidate_layers=chosen, sensitivity=tuple(found), cuts=tuple(cuts))
        return False


def _candidates(program: Program) -> tuple[int, ...]:
    """The layers to cut behind: as the recipe says, or by the profile of the calibration run."""
    tokens = program.recipe.tokens
    last = program.layers[-1].index
    if tokens.candidate_layers != "auto":
        if tokens.candidate_layers[-1] >= last:
            raise PlanError(
                f"layer {tokens.candidate_layers[-1]} cannot be cut behind: this model's last layer is {last}",
                where="tokens.candidate_layers",
                do=f"name layers from 0 to {last - 1}",
            )
        return tokens.candidate_layers
    facts = program.plan.facts[:-1]
    return candidate_layers(
        [fact.mass_median for fact in facts],
        [fact.mass_iqr for fact in facts],
        [fact.cosine for fact in facts],
        concentration_floor=tokens.concentration_floor,
        iqr_ceiling=tokens.iqr_ceiling,
        cosine_ceiling=tokens.cosine_ceiling,
        tail_fraction=tokens.tail_fraction,
        max_candidates=tokens.max_candidates,
    )
