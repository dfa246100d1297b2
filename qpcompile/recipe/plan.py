"""The plan: all decisions of a compile for one model, with the measurements they are based on.

A cut after layer l keeps ceil(visual * numerator / denominator) of the visual tokens that entered the decoder
("QUOTA", arXiv 2604.17320, equations 4 and 5, with the ratio as a fraction so that graphs compute it in integers).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from qpcompile.errors import PlanError, RecipeError
from qpcompile.nested import is_mapping
from qpcompile.recipe import yaml_text
from qpcompile.recipe.choice import Choice, Score
from qpcompile.recipe.messages import impossible, problems
from qpcompile.recipe.quantize import Section
from qpcompile.recipe.recipe import Recipe

_DO = "save the compiled model again, or copy its plan again: a compile writes it"


class Layer(Section):
    """One decoder layer."""

    index: int = Field(ge=0, description="Position in the decoder, from 0.")
    name: str = Field(min_length=1, description="Module path in the model.")


class LayerFacts(Section):
    """Measurements of calibration on one decoder layer, over the samples."""

    layer: int = Field(ge=0, description="Index of the layer.")
    mass_median: float = Field(description="Median of the top-10 attention mass from text to visual tokens.")
    mass_iqr: float = Field(ge=0, description="Interquartile range of the same.")
    cosine: float = Field(description="Median pairwise cosine between visual tokens.")


class Sensitivity(Section):
    """Sensitivity of one candidate layer to quantization."""

    layer: int = Field(ge=0, description="Index of the layer.")
    raw: float = Field(ge=0, description="Median relative deviation (equation 1).")
    normalized: float = Field(ge=0, le=1, description="The same between its percentiles (equation 2).")


class Cut(Section):
    """Visual tokens are dropped after this layer."""

    layer: int = Field(ge=-1, description="Last layer that sees the dropped tokens; -1: none, they end before layer 0.")
    ratio: float = Field(ge=0, le=1, description="Share of the first visual tokens that stay (equation 4).")
    numerator: int = Field(ge=0, description="The ratio as the graph computes it: numerator / denominator.")
    denominator: int = Field(ge=1, description="See numerator.")
    score: Score | None = Field(default=None, description="How tokens are scored; null: as the recipe's method does.")
    states: str | None = Field(
        default=None, description="Input of cross-attention whose rows are cut; null: tokens of the decoder's prompt."
    )

    def kept(self, visual: int) -> int:
        """Tokens that stay of `visual` tokens: ceil(visual * ratio) in integers."""
        return -(-visual * self.numerator // self.denominator)

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.states is not None:
            return f"of {self.states}, before the decoder"
        return "before the decoder" if self.layer < 0 else f"after layer {self.layer}"


KEPT = "kept"


class Site(Section):
    """One quantized site, and its kernel."""

    graph: str = Field(min_length=1, description="Graph the site is in.")
    name: str = Field(min_length=1, description="Module path of the linear, or of the attention for a cache write.")
    weight_bits: int | None = Field(default=None, description="Bits of the weight; null for a cache write.")
    activation_bits: int | None = Field(default=None, description="Bits of the input; null for a cache write.")
    cache_bits: int | None = Field(default=None, description="Bits of keys and values; null for a linear.")
    error: float | None = Field(
        default=None, ge=0, description="Relative error of the output on calibration; null: no data."
    )
    kernel: str = Field(min_length=1, description="Operator and back end the site is bound to.")
    codes: str | None = Field(
        default=None,
        description="Of a model from a quantized checkpoint: `kept`, or why its weights were rounded again.",
    )
    unseen_experts: int | None = Field(
        default=None,
        ge=0,
        description="Experts that no calibration token chose, solved by the tokens of the others; null: no experts, "
        "or no statistics.",
    )


class SiteBits(Section):
    """The bits that one site was assigned under `quantize.mean_bits`; linears that read one input are one site."""

    name: str = Field(min_length=1, description="Module path of the first linear that reads the input.")
    part: Literal["weights", "activations"] = Field(description="Whose bits.")
    bits: Literal[4, 8] = Field(description="Bits that were assigned.")
    size: int = Field(ge=1, description="Weights of the linears: what the site counts in the mean.")
    cost: float = Field(ge=0, description="Estimated divergence that 4 bits cause, nats of an answer's first token.")
    cost_raised: float = Field(ge=0, description="The same with 8 bits.")


class KeyCenter(Section):
    """The constant that is subtracted from the keys of one layer before they are rounded."""

    layer: int = Field(ge=0, description="Index of the layer.")
    share: float = Field(ge=0, le=1, description="Share of the keys' energy that is their mean.")
    sink: float | None = Field(
        default=None,
        ge=0,
        description="Residual norm, over the median, of the token whose key is exact; null: none is massive.",
    )


class LeftOut(Section):
    """One site in the recipe's scope that was not quantized."""

    graph: str = Field(min_length=1, description="Graph the site is in.")
    name: str = Field(min_length=1, description="Module path.")
    reason: str = Field(min_length=1, description="Why it stays as it is.")


class TrainedBlock(Section):
    """One block whose basis change was trained."""

    name: str = Field(min_length=1, description="Graph and layer; the graph alone for the part after its layers.")
    before: float = Field(ge=0, description="Relative squared error of the quantized block before training.")
    after: float = Field(ge=0, description="The same after training, before the weights are solved.")


class CalibrationUsed(Section):
    """The calibration data of a plan."""

    samples: int = Field(default=0, ge=0, description="Samples used; 0 for a compile without data.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="Hash of the samples in their order."
    )


class Loss(Section):
    """Agreement after one step of the compile, all steps before it included."""

    cause: str = Field(min_length=1, description="What was changed last: token cuts, weights, activations, cache.")
    equal_answers: int = Field(ge=0, description="Answers that are still equal.")
    divergence: float = Field(ge=0, description="KL divergence from full precision, nats per token.")


class Example(Section):
    """The answers of both models to one sample."""

    prompt: str = Field(default="", description="Text of the prompt, without pictures; empty: not recorded.")
    full: str = Field(description="Answer in full precision.")
    compiled: str = Field(description="Answer of the compiled model.")


class Quality(Section):
    """Agreement of the compiled model with the full-precision one."""

    samples: int = Field(ge=1, description="Answers that were compared.")
    apart: bool = Field(description="Whether calibration did not see these samples.")
    equal_answers: int = Field(ge=0, description="Greedy answers that are equal, token by token.")
    tokens: int = Field(ge=1, description="Tokens of all answers.")
    equal_tokens: int = Field(ge=0, description="Tokens that are likeliest in both models after the same text.")
    divergence: float = Field(ge=0, description="KL divergence from full precision, nats per token.")
    losses: tuple[Loss, ...] = Field(default=(), strict=False, description="The same after each step, in order.")
    raised: tuple[str, ...] = Field(
        default=(), strict=False, description="Overrides of the recipe that the compile made to reach min_agreement."
    )
    examples: tuple[Example, ...] = Field(
        default=(), strict=False, description="Some answers of both models, different ones first."
    )

    @property
    def agreement(self) -> float:
        """Share of equal answers."""
        return self.equal_answers / self.samples


PerLayer = TypeVar("PerLayer", LayerFacts, Sensitivity, Cut, KeyCenter)
Named = TypeVar("Named", Site, LeftOut)


class Plan(Section):
    """The plan of a compile. Lists are kept sorted, so that equal decisions give equal text."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    recipe: Recipe = Field(description="What was asked.")
    layers: tuple[Layer, ...] = Field(default=(), strict=False, description="The decoder.")
    candidate_layers: tuple[int, ...] = Field(
        default=(), strict=False, description="Layers after which tokens may be cut."
    )
    waived: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="What the method's choice of layers, or its score, could not take into account.",
    )
    facts: tuple[LayerFacts, ...] = Field(default=(), strict=False, description="Measurements per layer.")
    sensitivity: tuple[Sensitivity, ...] = Field(
        default=(), strict=False, description="Measurements per candidate layer."
    )
    cuts: tuple[Cut, ...] = Field(
        default=(), strict=False, description="Where visual tokens are dropped, and how many stay."
    )
    choice: Choice | None = Field(default=None, description="What a search tried and chose; null: none was made.")
    sites: tuple[Site, ...] = Field(default=(), strict=False, description="Everything that was quantized.")
    bits: tuple[SiteBits, ...] = Field(
        default=(), strict=False, description="Bits per site, where the recipe asks for a mean."
    )
    key_centers: tuple[KeyCenter, ...] = Field(
        default=(), strict=False, description="Layers whose keys are centred before they are rounded."
    )
    left_out: tuple[LeftOut, ...] = Field(default=(), strict=False, description="Everything in scope that was not.")
    trained: tuple[TrainedBlock, ...] = Field(default=(), strict=False, description="Training of changes of basis.")
    calibration: CalibrationUsed = Field(default=CalibrationUsed(), description="The data.")
    quality: Quality | None = Field(default=None, description="Agreement with full precision; null: not measured.")
    versions: dict[str, str] = Field(default={}, description="Packages the compile ran with.")

    @field_validator("layers")
    @classmethod
    def _sort_layers(cls, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(sorted(layers, key=lambda layer: layer.index))

    @field_validator("facts", "sensitivity", "cuts", "key_centers")
    @classmethod
    def _sort_by_layer(cls, entries: tuple[PerLayer, ...]) -> tuple[PerLayer, ...]:
        return tuple(sorted(entries, key=lambda entry: entry.layer))

    @field_validator("sites", "left_out")
    @classmethod
    def _sort_by_name(cls, entries: tuple[Named, ...]) -> tuple[Named, ...]:
        return tuple(sorted(entries, key=lambda entry: (entry.graph, entry.name)))

    @field_validator("bits")
    @classmethod
    def _sort_by_part(cls, entries: tuple[SiteBits, ...]) -> tuple[SiteBits, ...]:
        return tuple(sorted(entries, key=lambda entry: (entry.part, entry.name)))

    @field_validator("versions")
    @classmethod
    def _sort_versions(cls, versions: dict[str, str]) -> dict[str, str]:
        return dict(sorted(versions.items()))

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        reasons = _contradictions(self)
        if reasons:
            raise impossible(reasons)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_as_ours(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Raise one PlanError for all problems, however the plan is constructed."""
        try:
            return handler(data)
        except ValidationError as error:
            lines = problems(cls, error, data)
            raise PlanError(
                "\n  ".join(["the plan contradicts itself or its format:", *lines]), where=cls.__name__, do=_DO
            ) from error

    def changed(self, **parts: Any) -> "Plan":
        """A copy with other parts, sorted and validated like a new plan."""
        return Plan(**{**dict(self), **parts})

    def visual_tokens(self, visual: int, text: int = 0) -> tuple[int, ...]:
        """Visual tokens that each decoder layer processes, when `visual` tokens enter the decoder.

        text: the prompt's other tokens, which matter if the recipe rounds to a multiple.
        """
        multiple = self.recipe.tokens.multiple_of
        shares = {cut.layer: cut.kept(visual) for cut in self.cuts}
        kept = {layer: min(visual, share + -(text + share) % multiple) for layer, share in shares.items()}
        counts: list[int] = []
        current = kept.get(-1, visual)
        for layer in self.layers:
            counts.append(current)
            current = kept.get(layer.index, current)
        return tuple(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` parses to an equal plan."""
        return yaml_text.write(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> "Plan":
        """The plan from plain dicts, lists and scalars; `where` names its origin in errors."""
        if not is_mapping(data):
            raise PlanError(f"a mapping is needed, got {type(data).__name__}", where=where or "plan", do=_DO)
        try:
            return cls.model_validate(dict(data))
        except (PlanError, RecipeError) as error:
            raise PlanError(error.what, where=where or error.where, do=_DO) from error.__cause__

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "plan text") -> "Plan":
        """Parse the plan in `text`; `where` names its origin in errors."""
        data = yaml_text.parse_mapping(text, lambda what: PlanError(what, where=where, do=_DO), most=yaml_text.LARGE)
        return cls.from_dict(data, where=where)


def _contradictions(plan: Plan) -> dict[str, str]:
    """Key -> why the parts of a plan contradict each other."""
    reasons: dict[str, str] = {}
    if [layer.index for layer in plan.layers] != list(range(len(plan.layers))):
        reasons["layers"] = "indices must be 0, 1, 2, ... without a gap"
    if list(plan.candidate_layers) != sorted(set(plan.candidate_layers)):
        reasons["candidate_layers"] = "must be strictly increasing"
    for key, indices in _layer_lists(plan).items():
        if len(set(indices)) < len(indices):
            reasons[key] = "a layer is listed twice"
        # A cut may be before layer 0.
        first = -1 if key == "cuts" else 0
        unknown = [index for index in indices if not first <= index < len(plan.layers)]
        if unknown:
            reasons[key] = f"layer {unknown[0]} does not exist: the decoder has {len(plan.layers)} layers"
    if any(
        after.numerator * before.denominator > before.numerator * after.denominator
        for before, after in pairwise(plan.cuts)
    ):
        reasons["cuts"] = "a later cut keeps more tokens than an earlier one"
    if any(cut.numerator > cut.denominator for cut in plan.cuts):
        reasons["cuts"] = "a fraction is above 1"
    if any(abs(cut.numerator - cut.ratio * cut.denominator) > 1 for cut in plan.cuts):
        reasons["cuts"] = "numerator / denominator is not the ratio"
    places = [(site.graph, site.name) for site in (*plan.sites, *plan.left_out)]
    if len(set(places)) < len(places):
        reasons["sites"] = "a site is listed twice, or both quantized and left out"
    return reasons


def _layer_lists(plan: Plan) -> dict[str, list[int]]:
    """The layer numbers that each part of a plan refers to."""
    return {
        "candidate_layers": list(plan.candidate_layers),
        "facts": [facts.layer for facts in plan.facts],
        "sensitivity": [entry.layer for entry in plan.sensitivity],
        "cuts": [cut.layer for cut in plan.cuts],
        "key_centers": [entry.layer for entry in plan.key_centers],
    }
