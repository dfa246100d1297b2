"""The bits per site of a plan in words: for the terminal, the report and the model card."""

from __future__ import annotations

from qpcompile.recipe.plan import Plan


def told_bits(plan: Plan) -> list[str]:
    """One sentence for weights and one for activations, and one for centred keys; those that the plan has."""
    told: list[str] = []
    for part in dict.fromkeys(entry.part for entry in plan.bits):
        entries = [entry for entry in plan.bits if entry.part == part]
        raised = [entry for entry in entries if entry.bits == 8]
        size = sum(entry.size for entry in entries)
        mean = sum(entry.bits * entry.size for entry in entries) / size
        before = sum(entry.cost for entry in entries)
        after = before - sum(entry.cost - entry.cost_raised for entry in raised)
        told.append(
            f"{part}: 8 bits at {len(raised)} of {len(entries)} sites, {mean:.2f} on average; estimated cost "
            f"{before:.3g} nats with 4 bits everywhere, {after:.3g} as assigned"
        )
    if plan.key_centers:
        sinks = [entry for entry in plan.key_centers if entry.sink is not None]
        most = max((entry.sink or 0 for entry in sinks), default=0)
        share = sum(entry.share for entry in plan.key_centers) / len(plan.key_centers)
        told.append(
            f"keys are centred in {len(plan.key_centers)} layers: {share:.0%} of their energy is their mean; "
            + (
                f"exact sinks in {len(sinks)} layers, residuals up to {most:.0f} times the median"
                if sinks
                else "no sinks"
            )
        )
    return told
