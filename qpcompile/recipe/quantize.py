"""The section `quantize` of a recipe: every key with its type, bounds and meaning; `tokens` is in tokens.py."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qpcompile.recipe.choices import Solver
from qpcompile.recipe.messages import impossible

Scope = Literal["vision", "projector", "language"]

# Bounds beyond which a value is infeasible to compute or not representable; the keys say which.
MOST_SAMPLES = 1_000_000
MOST_SEED = 2**63 - 1
WIDEST = 65536
# What presets call the output head, which they leave in full precision.
HEAD_NAME = "lm_head"
MOST_PATTERNS, LONGEST_PATTERN = 1000, 500

# Python's regex matcher backtracks over repeats: exponentially if they nest, so their number is limited.
REPEATS = 4
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_NESTED = re.compile(r"\)[*+{]")


class Section(BaseModel):
    """A frozen group of keys: no unknown keys, no conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class WeightScheme(Section):
    """How linear weights are stored."""

    bits: Literal[4, 8, 16] = Field(
        default=4,
        description="4 packs two weights per byte; 8 stores one per byte; 16 leaves weights unquantized.",
    )
    granularity: Literal["channel", "group"] = Field(
        default="channel", description="One scale per output channel, or one per group of inputs of an output channel."
    )
    group_size: int = Field(
        default=128,
        ge=1,
        le=WIDEST,
        description="Inputs that share a scale; used with granularity group only. No linear is wider than the bound.",
    )
    symmetric: bool = Field(
        default=True, description="Codes around zero, -8..7 or -128..127. The kernels take no weight zero point."
    )
    solver: Solver = Field(default="gptq", description="How codes are chosen: one of the weight solvers below.")
    damping: float = Field(
        default=0.01,
        ge=1e-9,
        le=1,
        description="gptq: share of the mean Hessian diagonal that is added to the diagonal. Less than the bound "
        "vanishes in rounding.",
    )
    clip_search: bool = Field(
        default=True, description="Search each scale for the least squared error, not the full range."
    )

    @property
    def kernel_group(self) -> int:
        """The group size as the operators take it: 0 means one scale per output channel."""
        return self.group_size if self.granularity == "group" else 0


class ActivationScheme(Section):
    """How the inputs of linears are quantized at run time."""

    bits: Literal[4, 8, 16] = Field(
        default=4,
        description="4 and 8 use integer products, at the same speed on a CPU: codes of both are int8; 16 leaves the "
        "inputs of linears unquantized.",
    )
    granularity: Literal["token", "group", "modality"] = Field(
        default="token",
        description="One scale per token, or per group of channels of a token, or two static ones from calibration: "
        "for visual "
        "and for text tokens.",
    )
    group_size: int = Field(
        default=128,
        ge=1,
        le=WIDEST,
        description="Channels that share a scale; used with granularity group only. No linear is wider than the bound.",
    )
    symmetric: bool = Field(
        default=True, description="Codes around zero, -8..7 or -128..127. The kernels take no activation zero point."
    )
    clip_ratio: float = Field(
        default=1.0,
        ge=0.01,
        le=1,
        description="Clip ratio: the largest magnitude kept, as a share of the maximum. Below 0.01 most codes "
        "saturate.",
    )
    clip_search: bool = Field(
        default=False,
        description="Search a clip ratio per site, for the least output error on calibration tokens; used with "
        "quantized inputs only.",
    )

    @property
    def kernel_group(self) -> int:
        """The group size as the operators take it: 0 means one scale per token."""
        return self.group_size if self.granularity == "group" else 0


class TrainingScheme(Section):
    """How a learned basis change is trained, block by block; used with transform rotation and flatquant only."""

    samples: int = Field(
        default=32,
        ge=1,
        le=MOST_SAMPLES,
        description="Number of calibration samples used for training, from the first.",
    )
    epochs: int = Field(
        default=8,
        ge=0,
        le=10_000,
        description="Passes of each block over the samples; 0 keeps the initial transform. The bound takes weeks.",
    )
    batch: int = Field(default=4, ge=1, le=MOST_SAMPLES, description="Samples per optimizer step.")
    learning_rate: float = Field(
        default=5e-3,
        ge=1e-12,
        le=1,
        description="Adam's initial learning rate, with cosine decay. A step of 1 is as large as the trained entries, "
        "one of 1e-12 is lost in rounding.",
    )


class CacheScheme(Section):
    """How keys (after rotary positions) and values are stored, before attention reads them."""

    bits: Literal[4, 8, 16] = Field(
        default=4,
        description="4 packs two cache entries per byte; 8 uses one byte each; 16 leaves the cache unquantized.",
    )
    key_bits: Literal[4, 8] | None = Field(
        default=None,
        description="Bits of keys, which matter more than values, if not those of values; used with bits 4 and 8 only.",
    )
    granularity: Literal["token-head", "kivi"] = Field(
        default="token-head",
        description="One scale and zero point per token and head; kivi simulates, in floating point, keys per channel "
        "over "
        "32 tokens and values per token, in the cache alone.",
    )
    symmetric: bool = Field(
        default=False, description="The cache kernels store unsigned codes with a zero point, only."
    )
    center: bool = Field(
        default=False,
        description="Subtract the mean key of calibration from all keys of a head before they are rounded, which "
        "changes no attention; moved so that the key of a sink, a token with a massive residual, is exact.",
    )
    rotate: bool = Field(
        default=True, description="Rotate queries and keys by an orthogonal matrix first: same dot products."
    )

    def bits_of(self, role: str) -> int:
        """Bits of the codes of one role, key or value."""
        return self.key_bits if role == "key" and self.key_bits is not None and self.bits != 16 else self.bits

    @property
    def words(self) -> str:
        """The bits as text: `4 bits`, or `8 bits for keys, 4 for values`."""
        keys, values = self.bits_of("key"), self.bits_of("value")
        return f"{keys} bits" if keys == values else f"{keys} bits for keys, {values} for values"


class MeanBits(Section):
    """Mean bits over all sites, where each takes 4 or 8 by what they cost; null: the same bits everywhere."""

    weights: float | None = Field(
        default=None, ge=4, le=8, description="Mean over weights; used with weights.bits 4 only. null: weights.bits."
    )
    activations: float | None = Field(
        default=None,
        ge=4,
        le=8,
        description="Mean over multiplications; used with activations.bits 4 only. null: activations.bits.",
    )

    @property
    def asked(self) -> bool:
        """Whether any bits are assigned per site."""
        return self.weights is not None or self.activations is not None


class QuantizeScheme(Section):
    """What is quantized, and how."""

    weights: WeightScheme = Field(default=WeightScheme(), description="Weights of linears.")
    activations: ActivationScheme = Field(default=ActivationScheme(), description="Inputs of linears.")
    kv_cache: CacheScheme = Field(default=CacheScheme(), description="Keys and values of the decoder.")
    mean_bits: MeanBits = Field(
        default=MeanBits(), description="Bits per site by what their rounding costs, under a budget of mean bits."
    )
    head_bits: Literal[8, 16] = Field(
        default=16,
        description="8 stores the language head, which never has 4 bits, with one scale per output channel; its inputs "
        "are not quantized. Token embeddings tied to the head read the same 8-bit codes. 16 leaves "
        "both unquantized.",
    )
    simulation: Literal["none", "qvlm"] = Field(
        default="none",
        description="qvlm rounds weights to NF4 and inputs per channel over tokens, in floating point: a baseline "
        "without integer operators.",
    )
    transform: Literal["none", "hadamard", "rotation", "flatquant"] = Field(
        default="hadamard",
        description="Basis change of the inputs of linears that spreads outlier channels: hadamard is a fixed "
        "rotation; rotation is trained starting from it, layer by layer; flatquant trains any invertible transform.",
    )
    training: TrainingScheme = Field(default=TrainingScheme(), description="Training of a learned transform.")
    smooth: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="SmoothQuant strength of the per-channel scaling moved from inputs to weights before the "
        "rotation; null: none.",
    )
    scaling: Literal["none", "awq", "mbq"] = Field(
        default="none",
        description="Search the per-channel scaling for the least output error instead of taking a strength: awq; "
        "mbq weights visual and text tokens by their gradients.",
    )
    center: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Subtract the mean of an input, compensated in the bias, if it has more than this share of "
        "the input's energy; null: nowhere. Used with quantized weights only.",
    )
    scope: tuple[Scope, ...] = Field(
        default=("vision", "projector", "language"),
        strict=False,
        min_length=1,
        description="Components that are quantized.",
    )
    ignore: tuple[Annotated[str, Field(max_length=LONGEST_PATTERN)], ...] = Field(
        default=(HEAD_NAME,),
        strict=False,
        max_length=MOST_PATTERNS,
        description="Linears left unquantized: a module name or its last components, or `re:` and a regular expression "
        "matched from the start of the name, with at most 4 repeats (`*`, `+`, `{`), none of a group. A pattern that "
        "matches nothing is an error.",
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
            if pattern.startswith("re:") and (len(_REPEAT.findall(pattern)) > REPEATS or _NESTED.search(pattern)):
                raise ValueError(f"more than {REPEATS} repeats, or a repeated group: matching might not end")
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _kernels_exist(self) -> Self:
        reasons = _refusals(self)
        if reasons:
            raise impossible(reasons)
        return self


def matches_name(pattern: str, name: str) -> bool:
    """Whether an `ignore` pattern matches the module `name` (dotted path)."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def _refusals(scheme: QuantizeScheme) -> dict[str, str]:
    """Key -> why this combination is not supported."""
    weights, activations, cache = scheme.weights, scheme.activations, scheme.kv_cache
    reasons: dict[str, str] = {}
    if {weights.bits, activations.bits, cache.bits, scheme.head_bits} == {16}:
        reasons["weights.bits"] = "nothing is quantized; write `quantize: null`"
    if not weights.symmetric:
        reasons["weights.symmetric"] = "no linear kernel takes a weight zero point; write true"
    if not activations.symmetric:
        reasons["activations.symmetric"] = "no linear kernel takes an activation zero point; write true"
    if cache.symmetric:
        reasons["kv_cache.symmetric"] = "the cache kernels are asymmetric only; write false"
    if weights.bits == 16 and activations.bits != 16:
        reasons["activations.bits"] = "codes multiply codes only; set weights.bits to 4 or 8, or this to 16"
    if weights.bits == 8 and activations.bits == 4:
        reasons["activations.bits"] = "with 8-bit weights 4-bit inputs cost as much as 8-bit ones; write 8 or 16"
    if weights.bits == 8 and activations.bits == 16 and weights.kernel_group:
        reasons["weights.granularity"] = (
            "8-bit weights have one scale per channel for unquantized inputs; write channel"
        )
    means = {"weights": (scheme.mean_bits.weights, weights.bits)}
    means["activations"] = scheme.mean_bits.activations, activations.bits
    for part, (mean, bits) in means.items():
        if mean is not None and bits != 4:
            reasons[f"mean_bits.{part}"] = f"sites are raised from 4 bits to 8; set {part}.bits to 4, or this to null"
    if scheme.mean_bits.weights is not None and activations.bits == 16 and weights.kernel_group:
        reasons["weights.granularity"] = (
            "8-bit weights have one scale per channel for unquantized inputs; write channel"
        )
    if scheme.simulation != "none" and scheme.mean_bits.asked:
        reasons["mean_bits"] = "the simulation has 4 bits everywhere; set both to null"
    if weights.bits == 16 and scheme.transform != "none":
        reasons["transform"] = "it serves quantized linears and weights.bits is 16; write none"
    if weights.bits == 16 and scheme.smooth is not None:
        reasons["smooth"] = "it serves quantized linears and weights.bits is 16; write null"
    if scheme.head_bits == 8 and "language" not in scheme.scope:
        reasons["head_bits"] = "the head belongs to language, which is not in scope; write 16"
    if scheme.simulation != "none" and (weights.bits, activations.bits) != (4, 4):
        reasons["simulation"] = "it stands for 4-bit weights and activations; set both to 4, or write none"
    if cache.granularity == "kivi" and cache.bits == 16:
        reasons["kv_cache.granularity"] = "nothing is rounded at 16 bits; write token-head"
    if cache.center and (cache.bits == 16 or cache.granularity == "kivi"):
        reasons["kv_cache.center"] = "keys are not rounded per token; write false"
    if cache.key_bits is not None and cache.granularity == "kivi":
        reasons["kv_cache.key_bits"] = "kivi rounds keys and values to the same bits; write null"
    if activations.granularity == "modality" and activations.bits == 16:
        reasons["activations.granularity"] = "nothing is scaled at 16 bits; write token"
    if scheme.scaling != "none" and scheme.smooth is not None:
        reasons["smooth"] = f"scaling {scheme.scaling} searches what smooth fixes; write null"
    if weights.bits == 16 and scheme.scaling != "none":
        reasons["scaling"] = "it serves quantized linears and weights.bits is 16; write none"
    if weights.kernel_group and activations.bits != 16 and activations.kernel_group not in (0, weights.kernel_group):
        reasons["activations.group_size"] = (
            f"must equal weights.group_size ({weights.group_size}) when both are grouped"
        )
    return reasons
