"""The part of a recipe about agreement with the full-precision model, which every compile measures at its end."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qpcompile.recipe.messages import impossible
from qpcompile.recipe.quantize import MOST_SAMPLES, Section


class QualityScheme(Section):
    """How much is measured, and what agreement is demanded."""

    samples: int = Field(
        default=16,
        ge=0,
        le=MOST_SAMPLES,
        description="Maximum number of samples that both models answer: samples that calibration did not see, where "
        "the data has some, or else a fifth of those that it saw. 0 measures nothing.",
    )
    tokens: int = Field(
        default=16, ge=1, le=1024, description="Maximum length of these answers. Longer ones are compared up to here."
    )
    min_agreement: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Least share of equal greedy answers. Below it the compile starts again with what lost most "
        "raised one step, up to the ceilings below, and fails where none is left. null: any.",
    )
    max_keep: float | None = Field(
        default=None, gt=0, le=1, description="Ceiling for tokens.keep; a step is a factor of 1.4. null: not raised."
    )
    max_activation_bits: Literal[8, 16] | None = Field(
        default=None, description="Ceiling for quantize.activations.bits. null: not raised."
    )
    max_mean_bits: float | None = Field(
        default=None,
        gt=4,
        le=8,
        description="Ceiling for quantize.mean_bits where 4 bits lose most: the sites with the largest errors are "
        "raised before all of them. A step is 0.5 for weights and 1 for activations. null: not raised.",
    )
    max_cache_bits: Literal[8, 16] | None = Field(
        default=None, description="Ceiling for quantize.kv_cache.bits. null: not raised."
    )

    @property
    def may_raise(self) -> bool:
        """Whether a compile may start again with a raised recipe."""
        ceilings = (self.max_keep, self.max_activation_bits, self.max_mean_bits, self.max_cache_bits)
        return any(ceiling is not None for ceiling in ceilings)

    @model_validator(mode="after")
    def _demands_something(self) -> Self:
        if self.may_raise and self.min_agreement is None:
            raise impossible({"min_agreement": "ceilings are reached for only below it; write a share, or no ceilings"})
        if self.min_agreement is not None and not self.samples:
            raise impossible({"samples": "agreement is demanded and not measured; write 1 or more"})
        return self
