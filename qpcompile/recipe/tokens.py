"""The section `tokens` of a recipe: which visual tokens are dropped, where, and how they are selected.

The keys are the parameters of equations 1 to 9 of "QUOTA" (arXiv 2604.17320) and of the other methods; what a paper
does not specify is a key too, with our default.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, field_validator, model_validator

from qpcompile.nested import is_mapping
from qpcompile.recipe.choices import Method
from qpcompile.recipe.messages import impossible
from qpcompile.recipe.quantize import MOST_SEED, WIDEST, Section

MOST_LAYERS = 10_000
LARGEST_WEIGHT, LEAST_WEIGHT = 1e6, 1e-6
LayerList = Annotated[tuple[Annotated[int, Field(ge=0, lt=MOST_LAYERS)], ...], Field(strict=False, min_length=1)]


def _pairs(given: Any) -> tuple[tuple[Any, Any], ...]:
    """A mapping as pairs in one order: a recipe can be hashed."""
    if not is_mapping(given):
        raise ValueError("a mapping is needed")
    return tuple(sorted(given.items(), key=lambda pair: str(pair[0])))


OptionName = Annotated[str, Field(max_length=100)]
OptionValue = bool | int | float | Annotated[str, Field(max_length=500)]
Options = Annotated[
    tuple[tuple[OptionName, OptionValue], ...],
    Field(strict=False, max_length=100),
    BeforeValidator(_pairs),
    PlainSerializer(dict),
    WithJsonSchema({"type": "object"}),
]


class ScoreWeights(Section):
    """Weights of the four terms of a visual token's score; sums stay far from the limits of float32."""

    inter: float = Field(default=0.45, ge=0, le=LARGEST_WEIGHT, description="Attention from text queries.")
    magnitude: float = Field(default=0.25, ge=0, le=LARGEST_WEIGHT, description="L2 norm of the hidden state.")
    intra: float = Field(default=0.10, ge=0, le=LARGEST_WEIGHT, description="Attention from visual queries.")
    residual: float = Field(
        default=0.20,
        ge=0,
        le=LARGEST_WEIGHT,
        description="L2 error of rounding the hidden state as activations are.",
    )

    @model_validator(mode="after")
    def _some_term(self) -> Self:
        largest = max(self.inter, self.magnitude, self.intra, self.residual)
        if largest == 0:
            raise impossible({"inter": "all four weights are 0, so every token would score the same"})
        if largest < LEAST_WEIGHT:
            raise impossible({"inter": f"all four weights are below {LEAST_WEIGHT:g}: scores would vanish in float32"})
        return self


Metric = Literal[
    "complex",
    "complex_l1",
    "complex_mul",
    "l2_norm",
    "l1_norm",
    "l_inf",
    "variance",
    "dynamic_range",
    "quant_error",
    "quant_error_clip",
    "quant_error_group",
]
"""How the risk is measured; kernels/quantization_risk says what each is."""


class RiskScheme(Section):
    """The 4-bit quantization risk of each visual token as a score: QAPruner."""

    fuse: bool = Field(
        default=False,
        description="Fuse the risk into the score of a method that has one per token; qapruner always does.",
    )
    metric: Metric = Field(
        default="complex",
        description="complex: half the rounding error by groups, half the range of a token's channels.",
    )
    group_size: int = Field(
        default=128,
        ge=1,
        le=WIDEST,
        description="Channels that share a scale in the rounding error; larger values mean the full width.",
    )
    alpha: float = Field(
        default=0.55, ge=0, le=1, description="Weight of the method's own score; the rest is the risk's."
    )
    dynamic_alpha: bool = Field(
        default=True, description="Reduce alpha by up to 0.1 if the risks of a prompt's tokens vary strongly."
    )


class TokenScheme(Section):
    """Which visual tokens are dropped, where, and how they are selected."""

    method: Method = Field(
        default="none", description="How tokens are selected: one of the pruning methods below; none keeps all."
    )
    keep: float = Field(
        default=1.0,
        ge=1e-6,
        le=1,
        description="Share of visual tokens kept; see keep_of. Ratios are stored in millionths.",
    )
    keep_of: Literal["final", "mean"] = Field(
        default="final", description="keep is the share after the last cut, or the mean over decoder layers."
    )
    multiple_of: int = Field(
        default=1,
        ge=1,
        le=WIDEST,
        description="After every cut, the tokens of a prompt, text included, are as many as keep asks for or the next "
        "multiple of this: 64 fills the tiles of GPU kernels. A batch is counted by its longest row. A multiple "
        "longer than every prompt drops nothing.",
    )
    candidate_layers: Literal["auto"] | LayerList = Field(
        default="auto",
        description="Decoder layers after which tokens are cut, from 0, strictly increasing; auto profiles them. The "
        "model's own number of layers is checked as soon as it is known.",
    )
    max_candidates: int = Field(
        default=5, ge=1, le=MOST_LAYERS, description="auto: cut after at most this many consecutive layers."
    )
    concentration_floor: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="auto: no layer whose top-10 attention mass is below this share of the largest.",
    )
    iqr_ceiling: float = Field(
        default=0.5,
        ge=0,
        le=1000,
        description="auto: no layer whose mass varies (interquartile range) more than this x median; 1000 allows all.",
    )
    cosine_ceiling: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="auto: no layer whose token cosine is above min + this share of (max - min).",
    )
    tail_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="auto: never cut in this last share of the layers."
    )
    temperature: float = Field(
        default=1.25,
        ge=1e-3,
        le=1e3,
        description="Higher distributes the drops evenly, lower favours robust layers. At the bounds one layer "
        "takes all, or all take the same.",
    )
    eta: float = Field(
        default=1e-6,
        ge=1e-30,
        le=1,
        description="Added to the norm that sensitivity is divided by, so that it is never 0 in float32.",
    )
    sensitivity_of: Literal["output", "delta"] = Field(
        default="output", description="Sensitivity of a layer's output, or of what the layer adds to its input."
    )
    sensitivity_input: Literal["full_precision", "quantized"] = Field(
        default="full_precision",
        description="Whether the quantized layer reads the full-precision or the quantized output of the layer before "
        "it.",
    )
    sensitivity_percentiles: tuple[float, float] = Field(
        default=(10.0, 90.0), strict=False, description="Percentiles over candidate layers that become 0 and 1."
    )
    sensitivity_clip: tuple[float, float] = Field(
        default=(0.1, 0.9), strict=False, description="Bounds of the normalised sensitivity."
    )
    schedule: Literal["sensitivity", "uniform"] = Field(
        default="sensitivity", description="quota, random: drop more after robust layers, or the same after each."
    )
    weights: ScoreWeights = Field(default=ScoreWeights(), description="Weights of the score's terms.")
    scores_of: Literal["deployed", "full_precision"] = Field(
        default="deployed",
        description="quota: score values of the quantized decoder, or of the unquantized one. The "
        "latter is for comparison: the layers up to the cut run twice and keep their weights in full precision.",
    )
    sink_ratio: float | None = Field(
        default=None,
        gt=1,
        le=1e6,
        description="quota: exclude channels whose largest magnitude over the visual tokens is more than this x that "
        "of "
        "the median channel from magnitude and residual; null: none. No channel is larger than the bound.",
    )
    normalize: Literal["percentile", "mad", "rank"] = Field(
        default="percentile",
        description="How each term is normalized to 0..1 over the current visual tokens of a sample.",
    )
    percentiles: tuple[float, float] = Field(
        default=(1.0, 99.0), strict=False, description="normalize percentile: the percentiles that become 0 and 1."
    )
    queries: Literal["after_image", "last", "raters"] = Field(
        default="after_image",
        description="quota: text queries that count for inter: all after the first picture token, the last, or those "
        "with an above-average share of the picture embeddings' attention.",
    )
    intra_mean: bool = Field(
        default=False, description="Divide intra by the number of visual queries that can see the token."
    )
    residual_of: Literal["input", "stream"] = Field(
        default="input",
        description="Measure residual on what the next layer's first quantizer rounds, after norm, change of basis, "
        "centre and clip, or on the layer's output as the paper writes it.",
    )
    residual_space: Literal["plain", "transformed"] = Field(
        default="plain",
        description="residual_of stream: as it is, or rotated as the inputs of linears by transform hadamard.",
    )
    residual_relative: bool = Field(default=False, description="Divide residual by the norm of the rounded tensor.")
    tower_queries: Literal["class_token", "all"] = Field(
        default="class_token",
        description="visionzip, prumerge_plus: whose attention in the vision tower counts, the class token's where the "
        "tower has one, or all patches'.",
    )
    spread_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="visionzip, prumerge_plus: share of the kept tokens that are evenly spaced among the others; null: "
        "10/64 and 3/4.",
    )
    relevance_sign: Literal["plus", "minus"] = Field(
        default="plus",
        description="cdpruner, qapruner, trim: whether tokens similar to the question's text are relevant, or "
        "dissimilar ones.",
    )
    options: Options = Field(
        default=(),
        description="Keys of the method's own, which its file declares; they are listed below with the methods.",
    )
    risk: RiskScheme = Field(default=RiskScheme(), description="Quantization risk as a score.")
    position_mode: Literal["retain", "reindex"] = Field(
        default="retain", description="Kept tokens keep their positions, or are renumbered."
    )
    compact_scored_layer: bool = Field(
        default=True, description="Also drop the cut tokens from the cache of the layer that scored them."
    )
    seed: int = Field(
        default=0, ge=0, le=MOST_SEED, description="method random: seed of the draw. Generators take 63 bits."
    )

    @field_validator("candidate_layers")
    @classmethod
    def _layers_increase(cls, layers: Literal["auto"] | LayerList) -> Literal["auto"] | LayerList:
        if layers != "auto" and any(after <= before for before, after in pairwise(layers)):
            raise ValueError("layers must be strictly increasing")
        return layers

    @field_validator("sensitivity_percentiles", "percentiles")
    @classmethod
    def _percentiles_ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        return _ordered(pair, 100)

    @field_validator("sensitivity_clip")
    @classmethod
    def _clip_ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        return _ordered(pair, 1)

    @model_validator(mode="after")
    def _something_cuts(self) -> Self:
        if self.method == "none" and self.keep < 1:
            raise impossible({"keep": "method is none, which keeps every token; write 1.0, or choose a method"})
        return self


def _ordered(pair: tuple[float, float], top: float) -> tuple[float, float]:
    """The pair itself when 0 <= low < high <= top."""
    if not 0 <= pair[0] < pair[1] <= top:
        raise ValueError(f"needs 0 <= low < high <= {top}")
    return pair
