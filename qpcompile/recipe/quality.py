"""The part of a recipe about agreement with the full-precision model, which every compile measures at its end."""

from pydantic import Field

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
        description="Least share of equal greedy answers; a compile that ends below it fails. null: any.",
    )
