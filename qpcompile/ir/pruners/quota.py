"""QUOTA: a schedule by sensitivity, and scores of attention, magnitude and quantization residual.

Source: "QUOTA" (arXiv 2604.17320), section 3.2 (equations 2 to 5) and 3.3 (equations 6 to 8); the thresholds of the
candidate rule are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from qpcompile.ir.budget import candidate_layers, drop_shares, keep_ratios, normalize_sensitivity, sensitivity
from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import Program
from qpcompile.ir.pruners.pruner import Point, Schedule, cut_layers
from qpcompile.plan import Sensitivity
from qpcompile.recipe import Recipe
from qpcompile.recipe_schema import TokenScheme


@dataclass(frozen=True)
class Quota:
    """See the module's docstring."""

    def profiles(self, recipe: Recipe) -> bool:
        """Only where the layers to cut behind are found by measuring."""
        return recipe.tokens.candidate_layers == "auto"

    def schedule(self, program: Program) -> Schedule:
        """Candidate layers, and drops shared among them by how robust they are to quantization."""
        return sensitivity_schedule(program)

    def scores(self, point: Point) -> fx.Node:
        """The weighted sum of the four metrics."""
        tokens = point.recipe.tokens
        weights = tokens.weights
        # A stage-wise order scores with what is known without the quantizer (table 3 of the paper).
        residual = weights.residual if point.recipe.order == "joint" else 0.0
        return attention_scores(
            point, [weights.inter, weights.magnitude, weights.intra, residual], tokens, tokens.queries
        )


def attention_scores(point: Point, weights: Sequence[float], tokens: TokenScheme, queries: str) -> fx.Node:
    """The scored layer's `token_scores`; weights: of inter, magnitude, intra and residual."""
    attention = point.attention()
    return point.call(
        TOKEN_SCORES,
        point.hidden(),
        attention.query,
        attention.key,
        attention.mask,
        attention.scale,
        point.visual,
        point.alive,
        list(weights),
        tokens.normalize,
        tokens.percentiles[0],
        tokens.percentiles[1],
        queries,
        tokens.intra_mean,
        point.rotate and tokens.residual_space == "transformed",
    )


def sensitivity_schedule(program: Program) -> Schedule:
    """QUOTA's candidate layers and ratios."""
    tokens = program.recipe.tokens
    layers = cut_layers(program, (0,)) if tokens.candidate_layers != "auto" else _profiled(program)
    # Without samples, and in a stage-wise order, all layers count as equally sensitive.
    deviations = program.facts.get("deviations", {})
    if not deviations or program.recipe.order != "joint":
        deviations = {layer: [0.0] for layer in layers}
    table = [list(sample) for sample in zip(*[deviations[layer] for layer in layers], strict=True)]
    raw = sensitivity(table)
    normalized = normalize_sensitivity(raw, *tokens.sensitivity_percentiles, tokens.sensitivity_clip)
    shares = drop_shares(normalized, tokens.temperature)
    found = [
        Sensitivity(layer=layer, raw=one, normalized=other)
        for layer, one, other in zip(layers, raw, normalized, strict=True)
    ]
    return Schedule(layers, lambda keep: keep_ratios(shares, keep), tuple(found))


def _profiled(program: Program) -> tuple[int, ...]:
    """The candidate layers of the calibration run's profile."""
    tokens = program.recipe.tokens
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
