"""The part of a plan that says which score and schedule a search chose, what else it tried, and what each costs."""

from __future__ import annotations

from pydantic import Field

from qpcompile.recipe.quantize import Section


class Score(Section):
    """How the tokens at one cut are scored, where the method chooses that itself."""

    name: str = Field(min_length=1, description="Name of the score.")
    weights: tuple[float, ...] = Field(
        default=(), strict=False, description="Fitted weights of inter, magnitude, intra, residual; empty: its own."
    )


class Drop(Section):
    """One cut of a candidate."""

    layer: int = Field(ge=-1, description="Last layer that sees the dropped tokens; -1: none.")
    ratio: float = Field(ge=0, le=1, description="Share of the visual tokens that stay.")
    score: str = Field(min_length=1, description="Name of the score.")


class Candidate(Section):
    """A score and a schedule, and what they cost on the samples that the choice was made on."""

    drops: tuple[Drop, ...] = Field(strict=False, description="Its cuts, in order.")
    method: str | None = Field(default=None, description="The single method that this is; null: none.")
    samples: int = Field(ge=1, description="Samples it was tried on: bad candidates are dropped early.")
    cost: float = Field(ge=0, description="KL divergence from full precision, nats per token of the answer.")


class Price(Section):
    """What one candidate costs on samples that had no part in the choice."""

    name: str = Field(min_length=1, description="chosen, best single method, random, or all tokens.")
    drops: tuple[Drop, ...] = Field(default=(), strict=False, description="Its cuts.")
    answers: int = Field(ge=1, description="Answers that were compared.")
    equal_answers: int = Field(ge=0, description="Those whose every token is the likeliest, given the ones before.")
    cost: float = Field(ge=0, description="KL divergence from full precision, nats per token.")


class Choice(Section):
    """The result of a search for a score and a schedule."""

    samples: int = Field(ge=1, description="Samples that the choice was made on.")
    apart: bool = Field(description="Whether prices are of other samples than the choice.")
    candidates: tuple[Candidate, ...] = Field(
        default=(), strict=False, description="All that were tried: most samples first, then least cost."
    )
    prices: tuple[Price, ...] = Field(default=(), strict=False, description="Of the chosen one first.")
    left_out: tuple[str, ...] = Field(
        default=(), strict=False, description="Single methods that cannot be candidates here, and why."
    )
    warning: str | None = Field(default=None, description="What the user should know before trusting the choice.")
