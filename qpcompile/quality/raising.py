"""The next recipe to try when a compiled model agrees too little: the lever that lost most is raised one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qpcompile.errors import QualityError, RecipeError
from qpcompile.quality.meter import ACTIVATIONS, CACHE, CUTS, WEIGHTS
from qpcompile.quality.verdict import increments, verdict
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.recipe.recipe import Recipe

# A step of tokens.keep, and the bits that a step of activations or cache goes through.
STEP = 1.4
BITS = (4, 8, 16)
# The cause that each of quantize.mean_bits serves, and its step: bits of weights are memory.
MEANS = {WEIGHTS: ("weights", 0.5), ACTIVATIONS: ("activations", 1.0)}
# What a user can change where a cause loses most.
REMEDIES = {
    CUTS: "raise tokens.keep (tokens.keep={keep:.4g} is the next step), or choose another tokens.method",
    WEIGHTS: "raise quantize.mean_bits.weights, or set quantize.weights to solver gptq, clip_search true, smaller "
    "groups, or bits 16",
    ACTIVATIONS: "raise quantize.mean_bits.activations or quantize.activations.bits",
    CACHE: "raise quantize.kv_cache.bits",
}


@dataclass(frozen=True)
class Step:
    """The next recipe to try, the override that makes it, and why it is tried."""

    recipe: Recipe
    override: str
    reason: str


def next_step(plan: Plan) -> Step | None:
    """The next recipe to try; None if the compiled model agrees as demanded.

    Raises QualityError if it does not, and no lever is left below the recipe's ceilings.
    """
    quality, least = plan.quality, plan.recipe.quality.min_agreement
    if quality is None or least is None or quality.agreement >= least:
        return None
    causes = [cause for cause, _ in sorted(increments(quality), key=lambda part: -part[1])]
    for cause in causes:
        for override in _steps(plan.recipe, cause):
            try:
                return Step(plan.recipe.with_overrides([override]), override, verdict(quality))
            except RecipeError:
                continue  # no kernel for these bits beside the others: the next step up
    remedy = REMEDIES[causes[0]].format(keep=min(STEP * plan.recipe.tokens.keep, 1.0)) if causes else "change less"
    raise QualityError(
        f"{quality.agreement:.0%} of the answers are those of full precision, {least:.0%} are demanded",
        where="quality.min_agreement",
        do=f"{remedy}, or allow the compile to do so (quality.max_keep, max_mean_bits, max_activation_bits, "
        f"max_cache_bits), or demand less. Measured: {verdict(quality)}",
    )


def _steps(recipe: Recipe, cause: str) -> Iterator[str]:
    """Overrides that reduce one cause of loss, the smallest first."""
    ceilings, scheme = recipe.quality, recipe.quantize
    if cause == CUTS and ceilings.max_keep is not None and recipe.tokens.keep < ceilings.max_keep:
        yield f"tokens.keep={min(STEP * recipe.tokens.keep, ceilings.max_keep):.4g}"
    if scheme is None:
        return
    if cause in MEANS and (override := _more_mean_bits(recipe, scheme, cause)) is not None:
        yield override
    for own, key, now, most in (
        (ACTIVATIONS, "activations", scheme.activations.bits, ceilings.max_activation_bits),
        (CACHE, "kv_cache", scheme.kv_cache.bits, ceilings.max_cache_bits),
    ):
        if cause == own and most is not None:
            yield from (f"quantize.{key}.bits={bits}" for bits in BITS if now < bits <= most)


def _more_mean_bits(recipe: Recipe, scheme: QuantizeScheme, cause: str) -> str | None:
    """The next mean of bits of one cause, below its ceiling; None if there is none."""
    part, step = MEANS[cause]
    bits, mean = (
        (scheme.weights.bits, scheme.mean_bits.weights)
        if cause == WEIGHTS
        else (scheme.activations.bits, scheme.mean_bits.activations)
    )
    most, now = recipe.quality.max_mean_bits, mean or float(bits)
    if bits != BITS[0]:
        return None
    if most is not None and now < most:
        return f"quantize.mean_bits.{part}={min(now + step, most):g}"
    if mean is not None and now < BITS[1] and cause == ACTIVATIONS and recipe.quality.max_activation_bits is not None:
        # Bits of all sites cannot be set beside a mean: a mean of 8 is the same.
        return f"quantize.mean_bits.{part}={BITS[1]}"
    return None
