"""What a search for score and schedule chose, and its prices, as a short table: for terminal, report and model card."""

from __future__ import annotations

from collections.abc import Sequence

from qpcompile.recipe.choice import Choice, Drop

HEADS = ("", "cuts", "nats per token", "equal answers")


def price_rows(choice: Choice) -> list[tuple[str, str, str, str]]:
    """One row for each price: name, cuts, cost, and equal answers; see HEADS."""
    return [
        (price.name, cuts_in_words(price.drops), f"{price.cost:.3g}", f"{price.equal_answers} of {price.answers}")
        for price in choice.prices
    ]


def cuts_in_words(drops: Sequence[Drop]) -> str:
    """`cdpruner to 50 % before the decoder, text to 12.5 % after layer 3`."""
    return ", ".join(f"{drop.score} to {100 * drop.ratio:.3g} % {_place(drop.layer)}" for drop in drops) or "none"


def how_chosen(choice: Choice) -> str:
    """How many candidates were compared, on what."""
    apart = "priced on others" if choice.apart else "priced on the same, since there are no others"
    return f"the cheapest of {len(choice.candidates)} scores and schedules on {choice.samples} samples, {apart}"


def _place(layer: int) -> str:
    return "before the decoder" if layer < 0 else f"after layer {layer}"
