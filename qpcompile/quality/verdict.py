"""A measured agreement in words: for the terminal, the report and the model card."""

from __future__ import annotations

from math import sqrt

from qpcompile.recipe.plan import Quality

# Shares of equal answers from which an agreement is called good or fair.
GOOD, FAIR = 0.95, 0.85


def grade(quality: Quality) -> str:
    """good, fair or poor, by the share of equal answers."""
    share = quality.agreement
    return "good" if share >= GOOD else "fair" if share >= FAIR else "poor"


def verdict(quality: Quality) -> str:
    """One sentence: how many answers are equal, how sure that is, and what loses most."""
    low, high = interval(quality.equal_answers, quality.samples)
    told = (
        f"{grade(quality)}: {quality.equal_answers} of {quality.samples} answers equal full precision's "
        f"({quality.agreement:.0%}; 95 % interval {low:.0%} to {high:.0%}), {quality.divergence:.3g} nats per token"
    )
    worst = max(increments(quality), key=lambda part: part[1], default=None)
    if worst is not None and worst[1] > 0 and len(quality.losses) > 1:
        told += f"; most is lost to {worst[0]}"
    return told + f" ({measured_on(quality)})"


def measured_on(quality: Quality) -> str:
    """Which samples an agreement was measured on."""
    if quality.apart:
        return "on samples that calibration did not see"
    return "on a fifth of the calibration samples, since there were no others: it may look better than it is"


def increments(quality: Quality) -> list[tuple[str, float]]:
    """(cause, divergence that it adds to the causes before it, in nats per token); it may be negative."""
    before, parts = 0.0, list[tuple[str, float]]()
    for loss in quality.losses:
        parts.append((loss.cause, loss.divergence - before))
        before = loss.divergence
    return parts


def interval(equal: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; with few samples it is wide."""
    z, share = 1.96, equal / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
