"""The final keep ratio of a schedule with a given mean over layers, so that methods can be compared."""

from __future__ import annotations

from qpcompile.errors import PlanError
from qpcompile.pruning.pruner import Schedule

BISECTIONS = 60


def final_keep(schedule: Schedule, mean: float, depth: int) -> float:
    """The final keep ratio whose mean over `depth` layers is `mean`; PlanError if even the smallest one keeps more."""
    low, high = 1e-6, 1.0
    if schedule.mean(low, depth) > mean:
        raise PlanError(
            f"cutting after layers {list(schedule.layers)} of {depth} computes at least "
            f"{schedule.mean(low, depth):.4f} of the visual tokens, {mean} was asked",
            where="tokens.keep",
            do="ask for a larger mean, or name earlier tokens.candidate_layers",
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if schedule.mean(middle, depth) < mean else (low, middle)
    return high
