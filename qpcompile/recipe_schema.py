"""The sections of a recipe: every key with its type, its bounds and its meaning.

The keys under `tokens` are equations 1 to 9 of "QUOTA" (arXiv 2604.17320); what the paper leaves open is a key too,
with our default.
"""

import re
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qpcompile.schema_text import impossible

Scope = Literal["vision", "projector", "language"]
LayerList = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """A frozen group of keys: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class WeightScheme(Section):
    """How linear weights are stored."""

    bits: Literal[4, 16] = Field(default=4, description="4 packs two weights in a byte; 16 leaves weights as they are.")
    granularity: Literal["channel", "group"] = Field(
        default="channel", description="One scale per output channel, or one per group of inputs of an output channel."
    )
    group_size: int = Field(
        default=128, ge=1, description="Inputs that share a scale; read with granularity group only."
    )
    symmetric: bool = Field(default=True, description="Codes -8..7 around zero. The kernels take no weight zero point.")
    solver: Literal["gptq", "rtn"] = Field(
        default="gptq",
        description="gptq corrects later columns for the rounding of earlier ones; rtn rounds to nearest.",
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="gptq: share of the mean Hessian diagonal that is added to the diagonal."
    )
    clip_search: bool = Field(
        default=True, description="Search each scale for the least squared error, not the full range."
    )

    @property
    def kernel_group(self) -> int:
        """The group size as the operators take it: 0 means one scale per output channel."""
        return self.group_size if self.granularity == "group" else 0


class ActivationScheme(Section):
    """How the inputs of linears are quantized, each token on its own, when the model runs."""

    bits: Literal[4, 16] = Field(
        default=4, description="4 multiplies integers; 16 leaves the inputs of linears as they are."
    )
    granularity: Literal["token", "group", "modality"] = Field(
        default="token",
        description="One scale per token, or per group of channels of a token, or two fixed by calibration: for visual "
        "and for text tokens.",
    )
    group_size: int = Field(
        default=128, ge=1, description="Channels that share a scale; read with granularity group only."
    )
    symmetric: bool = Field(
        default=True, description="Codes -8..7 around zero. The kernels take no activation zero point."
    )
    clip_ratio: float = Field(
        default=1.0, gt=0, le=1, description="The largest magnitude kept, as a share of the true one."
    )
    clip_search: bool = Field(
        default=False,
        description="Search a clip ratio for each site, for the least output error on calibration tokens; read with "
        "4-bit inputs only.",
    )

    @property
    def kernel_group(self) -> int:
        """The group size as the operators take it: 0 means one scale per token."""
        return self.group_size if self.granularity == "group" else 0


class TrainingScheme(Section):
    """How a learned change of basis is trained, block by block; read with transform rotation and flatquant only."""

    samples: int = Field(default=32, ge=1, description="Calibration samples that are trained on, the first of them.")
    epochs: int = Field(
        default=8, ge=0, description="Times that each block sees each sample; 0 keeps what a transform begins with."
    )
    batch: int = Field(default=4, ge=1, description="Samples per step.")
    learning_rate: float = Field(default=5e-3, gt=0, description="Adam's first step size; it falls by a cosine.")


class CacheScheme(Section):
    """How keys (after rotary positions) and values are stored, before attention reads them."""

    bits: Literal[4, 8, 16] = Field(
        default=4, description="4 packs two cache entries in a byte; 8 takes a byte each; 16 leaves the cache as it is."
    )
    granularity: Literal["token-head", "kivi"] = Field(
        default="token-head",
        description="One scale and zero per token and head; kivi simulates, in floating point, keys per channel over "
        "32 tokens and values per token, in the cache alone.",
    )
    symmetric: bool = Field(
        default=False, description="The cache kernels store unsigned codes with a zero point, only."
    )
    rotate: bool = Field(
        default=True, description="Rotate queries and keys by an orthogonal matrix first: same products."
    )


class QuantizeScheme(Section):
    """What is stored and computed in 4 bits."""

    weights: WeightScheme = Field(default=WeightScheme(), description="Weights of linears.")
    activations: ActivationScheme = Field(default=ActivationScheme(), description="Inputs of linears.")
    kv_cache: CacheScheme = Field(default=CacheScheme(), description="Keys and values of the decoder.")
    simulation: Literal["none", "qvlm"] = Field(
        default="none",
        description="qvlm rounds weights to NF4 and inputs per channel over tokens, in floating point: a comparison "
        "that no integer operator runs.",
    )
    transform: Literal["none", "hadamard", "rotation", "flatquant"] = Field(
        default="hadamard",
        description="Change of basis of the inputs of linears that spreads outlier channels: hadamard is a fixed "
        "rotation; rotation is learned from it, layer by layer; flatquant learns any invertible one.",
    )
    training: TrainingScheme = Field(default=TrainingScheme(), description="Training of a learned transform.")
    smooth: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Strength of the per-channel scaling moved from inputs to weights before the rotation; null: none.",
    )
    scaling: Literal["none", "awq", "mbq"] = Field(
        default="none",
        description="Search the per-channel scaling for the least output error instead of taking a strength: awq; "
        "mbq weighs visual and text tokens by their gradients.",
    )
    center: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Subtract the mean of an input, put back through the bias, where it holds more than this share of "
        "the input's energy; null: nowhere. Read with 4-bit weights only.",
    )
    scope: tuple[Scope, ...] = Field(
        default=("vision", "projector", "language"),
        strict=False,
        min_length=1,
        description="Components that are quantized.",
    )
    ignore: tuple[str, ...] = Field(
        default=("lm_head",),
        strict=False,
        description="Linears left as they are: a module name or its last parts, or `re:` and a regular expression "
        "matched from the start of the name. A pattern that matches nothing is an error.",
    )

    @field_validator("scope")
    @classmethod
    def _scope_once(cls, scope: tuple[Scope, ...]) -> tuple[Scope, ...]:
        if len(set(scope)) < len(scope):
            raise ValueError("a component is listed twice")
        return scope

    @field_validator("ignore")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not pattern.removeprefix("re:"):
                raise ValueError("an empty pattern")
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _kernels_exist(self) -> Self:
        reasons = _refusals(self)
        if reasons:
            raise impossible(reasons)
        return self


def matches_name(pattern: str, name: str) -> bool:
    """Whether an `ignore` pattern means the module `name` (dotted path)."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def _refusals(scheme: QuantizeScheme) -> dict[str, str]:
    """Key -> why no kernel can run this combination."""
    weights, activations, cache = scheme.weights, scheme.activations, scheme.kv_cache
    reasons: dict[str, str] = {}
    if {weights.bits, activations.bits, cache.bits} == {16}:
        reasons["weights.bits"] = "nothing is quantized; write `quantize: null`"
    if not weights.symmetric:
        reasons["weights.symmetric"] = "no linear kernel takes a weight zero point; write true"
    if not activations.symmetric:
        reasons["activations.symmetric"] = "no linear kernel takes an activation zero point; write true"
    if cache.symmetric:
        reasons["kv_cache.symmetric"] = "the cache kernels are asymmetric only; write false"
    if weights.bits == 16 and activations.bits == 4:
        reasons["activations.bits"] = "4-bit inputs multiply 4-bit weights only; set weights.bits to 4 or this to 16"
    if weights.bits == 16 and scheme.transform != "none":
        reasons["transform"] = "it serves 4-bit linears and weights.bits is 16; write none"
    if weights.bits == 16 and scheme.smooth is not None:
        reasons["smooth"] = "it serves 4-bit linears and weights.bits is 16; write null"
    if scheme.simulation != "none" and (weights.bits, activations.bits) != (4, 4):
        reasons["simulation"] = "it stands for 4-bit weights and activations; set both to 4, or write none"
    if cache.granularity == "kivi" and cache.bits == 16:
        reasons["kv_cache.granularity"] = "nothing is rounded at 16 bits; write token-head"
    if activations.granularity == "modality" and activations.bits == 16:
        reasons["activations.granularity"] = "nothing is scaled at 16 bits; write token"
    if scheme.scaling != "none" and scheme.smooth is not None:
        reasons["smooth"] = f"scaling {scheme.scaling} searches what smooth fixes; write null"
    if weights.bits == 16 and scheme.scaling != "none":
        reasons["scaling"] = "it serves 4-bit linears and weights.bits is 16; write none"
    if weights.kernel_group and activations.bits == 4 and activations.kernel_group not in (0, weights.kernel_group):
        reasons["activations.group_size"] = (
            f"must equal weights.group_size ({weights.group_size}) when both are grouped"
        )
    return reasons


class ScoreWeights(Section):
    """Weights of the four terms of a visual token's score."""

    inter: float = Field(default=0.45, ge=0, description="Attention from text queries.")
    magnitude: float = Field(default=0.25, ge=0, description="L2 norm of the hidden state.")
    intra: float = Field(default=0.10, ge=0, description="Attention from visual queries.")
    residual: float = Field(default=0.20, ge=0, description="L2 error of rounding the hidden state to 4 bits.")

    @model_validator(mode="after")
    def _some_term(self) -> Self:
        if not any((self.inter, self.magnitude, self.intra, self.residual)):
            raise impossible({"inter": "all four weights are 0, so every token would score the same"})
        return self


RISK_FUSED = ("quota", "visionzip")
"""Methods that put the risk into their score on demand; qapruner always does."""


class RiskScheme(Section):
    """What 4 bits would lose of each visual token, as a score: QAPruner."""

    fuse: bool = Field(
        default=False, description="Put the risk into the scores of quota and visionzip too; qapruner always does."
    )
    metric: Literal[
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
    ] = Field(
        default="complex",
        description="complex: half the rounding error by groups, half the range of a token's channels.",
    )
    group_size: int = Field(
        default=128, ge=1, description="Channels that share a scale in the rounding error; at most the width counts."
    )
    alpha: float = Field(
        default=0.55, ge=0, le=1, description="Share of the method's own score; the rest is the risk's."
    )
    dynamic_alpha: bool = Field(
        default=True, description="Take up to 0.1 off alpha where the risks of a prompt's tokens vary much."
    )


class TokenScheme(Section):
    """Which visual tokens are dropped, where, and how they are chosen."""

    method: Literal[
        "none",
        "joint",
        "quota",
        "random",
        "fastv",
        "pyramiddrop",
        "sparsevlm",
        "vtw",
        "random_input",
        "visionzip",
        "prumerge_plus",
        "dart",
        "cdpruner",
        "qapruner",
        "divprune",
        "trim",
    ] = Field(
        default="none",
        description="none keeps all; joint solves the schedule with the least measured cost; quota scores every token "
        "at several layers; random draws by seed on the same schedule; fastv cuts once, by the last token's attention; "
        "pyramiddrop three times, by that of the layer behind; sparsevlm three times, by the attention of chosen text; "
        "vtw drops every visual token; random_input draws before the decoder; visionzip and prumerge_plus score by the "
        "vision tower's attention before the decoder and merge; dart keeps a few pivots and the tokens least "
        "like them, behind the second layer; cdpruner, qapruner (with risk), divprune and trim choose before the "
        "decoder.",
    )
    keep: float = Field(default=1.0, gt=0, le=1, description="Share of visual tokens that stays; see keep_of.")
    keep_of: Literal["final", "mean"] = Field(
        default="final", description="keep is the share behind the last cut, or the mean over decoder layers."
    )
    candidate_layers: Literal["auto"] | LayerList = Field(
        default="auto",
        description="Decoder layers after which tokens are cut, from 0, strictly increasing; auto profiles them.",
    )
    max_candidates: int = Field(default=5, ge=1, description="auto: cut after at most so many neighbouring layers.")
    concentration_floor: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="auto: skip first layers whose top-10 attention mass is below this share of the best.",
    )
    iqr_ceiling: float = Field(
        default=0.5,
        ge=0,
        description="auto: skip first layers whose mass varies (interquartile range) more than this x median.",
    )
    cosine_ceiling: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="auto: skip layers whose token cosine is above min + this share of (max - min).",
    )
    tail_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="auto: never cut in this last share of the layers."
    )
    cost_levels: tuple[float, ...] = Field(
        default=(0.02, 0.05, 0.12, 0.3, 0.5, 0.7, 0.85),
        strict=False,
        description="joint: shares of the visual tokens whose cost is measured at every layer.",
    )
    cost_samples: int = Field(default=32, ge=1, description="joint: samples that costs are measured on, at most.")
    temperature: float = Field(
        default=1.25, gt=0, description="Higher spreads the drops evenly, lower favours robust layers."
    )
    eta: float = Field(default=1e-6, gt=0, description="Added to the norm that sensitivity is divided by.")
    sensitivity_of: Literal["output", "delta"] = Field(
        default="output", description="Sensitivity of a layer's output, or of what the layer adds to its input."
    )
    sensitivity_percentiles: tuple[float, float] = Field(
        default=(10.0, 90.0), strict=False, description="Percentiles over candidate layers that become 0 and 1."
    )
    sensitivity_clip: tuple[float, float] = Field(
        default=(0.1, 0.9), strict=False, description="Bounds of the normalised sensitivity."
    )
    schedule: Literal["sensitivity", "uniform"] = Field(
        default="sensitivity", description="quota, random: drop more behind robust layers, or the same behind each."
    )
    weights: ScoreWeights = Field(default=ScoreWeights(), description="Weights of the score's terms.")
    scores_of: Literal["deployed", "full_precision"] = Field(
        default="deployed",
        description="quota: score what the quantized decoder computes, or what it would without quantization. The "
        "second is for comparison: the layers up to the cut run twice and keep their weights in full precision.",
    )
    sink_ratio: float | None = Field(
        default=None,
        gt=1,
        description="quota: leave channels whose largest magnitude over the visual tokens is more than this x that of "
        "the median channel out of magnitude and residual; null: none.",
    )
    normalize: Literal["percentile", "mad", "rank"] = Field(
        default="percentile", description="How each term becomes 0..1 over the current visual tokens of a sample."
    )
    percentiles: tuple[float, float] = Field(
        default=(1.0, 99.0), strict=False, description="normalize percentile: the percentiles that become 0 and 1."
    )
    queries: Literal["after_image", "last", "raters"] = Field(
        default="after_image",
        description="quota: text queries that count for inter: all after the first picture token, the last, or those "
        "that the picture's embeddings point at more than at the average one.",
    )
    intra_mean: bool = Field(
        default=False, description="Divide intra by the number of visual queries that can see the token."
    )
    residual_space: Literal["transformed", "plain"] = Field(
        default="transformed",
        description="Measure residual after the recipe's rotation, as linears see it, or without it.",
    )
    residual_of: Literal["stream", "input"] = Field(
        default="stream",
        description="Measure residual on the layer's output, or on what the next layer's first linear really rounds.",
    )
    residual_relative: bool = Field(default=False, description="Divide residual by the norm of what is rounded.")
    tower_queries: Literal["class_token", "all"] = Field(
        default="class_token",
        description="visionzip, prumerge_plus: whose attention in the vision tower counts, the class token's where the "
        "tower has one, or all patches'.",
    )
    spread_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="visionzip, prumerge_plus: share of the kept tokens that lie evenly among the others; null: "
        "10/64 and 3/4.",
    )
    relevance_sign: Literal["plus", "minus"] = Field(
        default="plus",
        description="cdpruner, qapruner, trim: tokens whose embedding is like the question's text are relevant, or "
        "those unlike it.",
    )
    risk: RiskScheme = Field(default=RiskScheme(), description="Risk of quantization as a score.")
    position_mode: Literal["retain", "reindex"] = Field(
        default="retain", description="Kept tokens keep their positions, or are counted anew."
    )
    compact_scored_layer: bool = Field(
        default=True, description="Also drop the cut tokens from the cache of the layer that scored them."
    )
    seed: int = Field(default=0, ge=0, description="method random: seed of the draw.")

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
    def _risk_has_a_score(self) -> Self:
        if self.risk.fuse and self.method not in RISK_FUSED:
            raise impossible({"risk.fuse": f"method is {self.method}; {', '.join(RISK_FUSED)} can fuse the risk"})
        return self

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
