"""Sweep plans: every pruner with every quantizer at every share of tokens, and ablations, on every testbed.

    version: 1
    beds:
      - {name: llava, model: tests/testbed/llava, data: build/unseen/llava, calibration: build/calibration/llava}
    seeds: [0, 1, 2]
    shares: [0.42, 0.3, 0.125]
    quantizers:
      fp16: {seeds: [0]}
      w4a4kv4: {recipe: w4a4kv4}
    pruners:
      none: {}
      random: {set: [tokens.method=random]}
      quota: {set: [tokens.method=quota]}
    ablations:
      score: {quantizer: w4a4kv4, pruner: quota, share: 0.3, variants: {no residual: [tokens.weights.residual=0]}}

A row's recipe takes `quantize` from the quantizer and `tokens` from the pruner, then both lists of overrides, then
`budget` with the share filled in. A pruner whose method is none has one row per quantizer, with all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qpcompile.errors import RecipeError
from qpcompile.recipe import yaml_text
from qpcompile.recipe.messages import impossible, problems
from qpcompile.recipe.quantize import MOST_SAMPLES, MOST_SEED, Section
from qpcompile.recipe.recipe import Recipe

Share = Annotated[float, Field(gt=0, le=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...], Field(strict=False, min_length=1)]
Overrides = Annotated[tuple[str, ...], Field(strict=False)]
ALL_TOKENS = 1.0


class Bed(Section):
    """A model with its questions and its calibration data."""

    name: str = Field(min_length=1, description="Name in tables.")
    model: str = Field(min_length=1, description="Folder or hub name.")
    data: str = Field(min_length=1, description="Folder of the questions.")
    calibration: str = Field(min_length=1, description="Folder that samples are drawn from.")
    batch_size: int = Field(default=16, ge=1, le=MOST_SAMPLES, description="Questions asked at once.")


class Setting(Section):
    """A part of a recipe: a preset or file, and overrides."""

    recipe: str = Field(default="none", description="Preset or file whose section is taken.")
    set: Overrides = Field(default=(), description="Overrides `key=value`.")
    seeds: Seeds | None = Field(default=None, description="Other seeds than the plan's.")


class Ablation(Section):
    """One combination, and its variants with single settings changed."""

    quantizer: str = Field(description="Name under `quantizers`.")
    pruner: str = Field(description="Name under `pruners`.")
    share: Share = Field(default=ALL_TOKENS, description="Share of visual tokens.")
    beds: tuple[str, ...] | None = Field(default=None, strict=False, description="Beds; null: all.")
    variants: dict[str, Overrides] = Field(min_length=1, description="Name -> overrides.")


class SweepPlan(Section):
    """See the module's docstring."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    beds: tuple[Bed, ...] = Field(strict=False, min_length=1, description="Models and data to evaluate.")
    questions: int | None = Field(default=None, ge=1, description="Ask only the first N; null: all.")
    max_new_tokens: int = Field(default=16, ge=1, description="Longest answer, in tokens.")
    seeds: Seeds = Field(default=(0,), description="Calibration draws.")
    shares: tuple[Share, ...] = Field(default=(), strict=False, description="Shares of visual tokens.")
    budget: tuple[str, ...] = Field(
        default=("tokens.keep={share}", "tokens.keep_of=mean"),
        strict=False,
        description="Overrides that make a share of tokens, with {share} replaced.",
    )
    samples: int | None = Field(
        default=None, ge=1, le=MOST_SAMPLES, description="Calibration samples of a draw; null: the recipe's."
    )
    quantizers: dict[str, Setting] = Field(min_length=1, description="Name -> quantization setting.")
    pruners: dict[str, Setting] = Field(min_length=1, description="Name -> pruning setting.")
    reference: str | None = Field(default=None, description="The pruner others are compared with.")
    ablations: dict[str, Ablation] = Field(default={}, description="Name -> ablation.")

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        reasons = {
            f"ablations.{name}.{key}": f"{value!r} is not under {key}s"
            for name, ablation in self.ablations.items()
            for key, value, known in (
                ("quantizer", ablation.quantizer, self.quantizers),
                ("pruner", ablation.pruner, self.pruners),
            )
            if value not in known
        }
        beds = {bed.name for bed in self.beds}
        for name, ablation in self.ablations.items():
            if unknown := set(ablation.beds or ()) - beds:
                reasons[f"ablations.{name}.beds"] = f"no bed is named {min(unknown)}"
        if self.reference is not None and self.reference not in self.pruners:
            reasons["reference"] = f"{self.reference!r} is not under pruners"
        if len(beds) < len(self.beds):
            reasons["beds"] = "a name is used twice"
        if reasons:
            raise impossible(reasons)
        return self

    @classmethod
    def load(cls, path: Path) -> SweepPlan:
        """Load the plan in a YAML file; RecipeError naming every invalid key."""
        where, do = yaml_text.short(str(path)), "write the plan as the harness page of the documentation shows"
        refuse = partial(RecipeError, where=where, do=do)
        text = yaml_text.read(path, lambda what: refuse(f"the plan {what}"))
        data = yaml_text.parse_mapping(text, refuse)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = "\n  ".join(["the plan has keys that cannot be used:", *problems(cls, error, data)])
            raise refuse(lines) from error


@dataclass(frozen=True)
class Cell:
    """One row to compute: its position in the tables, and its recipe (None: full precision)."""

    bed: Bed
    quantizer: str
    pruner: str
    share: float
    seed: int
    recipe: Recipe | None
    ablation: str | None = None
    variant: str | None = None

    @property
    def name(self) -> str:
        """A human-readable name."""
        if self.recipe is None:
            return f"{self.bed.name}, full precision"
        what = f"{self.bed.name}, {self.quantizer}, {self.pruner} at {self.share:g}, seed {self.seed}"
        return what if self.ablation is None else f"{what}; {self.ablation}: {self.variant}"


BASE = "unchanged"


def cells(plan: SweepPlan) -> Iterator[Cell]:
    """All rows, in an order that shares measurements: full precision first, then bed by bed and seed by seed."""
    for bed in plan.beds:
        yield Cell(bed, "", "", ALL_TOKENS, 0, None)
        settings = [*plan.quantizers.values(), *plan.pruners.values()]
        seeds = sorted({seed for chosen in (plan, *settings) for seed in chosen.seeds or ()})
        for seed in seeds:
            for quantizer in plan.quantizers:
                yield from _factorial(plan, bed, seed, quantizer)
                yield from _ablations(plan, bed, seed, quantizer)


def _factorial(plan: SweepPlan, bed: Bed, seed: int, quantizer: str) -> Iterator[Cell]:
    for pruner in plan.pruners:
        if seed not in _seeds(plan, quantizer, pruner):
            continue
        for share in plan.shares if prunes(plan, pruner) else (ALL_TOKENS,):
            yield Cell(bed, quantizer, pruner, share, seed, compose(plan, quantizer, pruner, share, seed))


def _ablations(plan: SweepPlan, bed: Bed, seed: int, quantizer: str) -> Iterator[Cell]:
    for name, ablation in plan.ablations.items():
        if ablation.quantizer != quantizer or (ablation.beds is not None and bed.name not in ablation.beds):
            continue
        if seed not in _seeds(plan, quantizer, ablation.pruner):
            continue
        for variant, overrides in {BASE: (), **ablation.variants}.items():
            recipe = compose(plan, quantizer, ablation.pruner, ablation.share, seed, overrides)
            yield Cell(bed, quantizer, ablation.pruner, ablation.share, seed, recipe, name, variant)


def _seeds(plan: SweepPlan, quantizer: str, pruner: str) -> tuple[int, ...]:
    """The seeds of the pruner, else of the quantizer, else of the plan."""
    return plan.pruners[pruner].seeds or plan.quantizers[quantizer].seeds or plan.seeds


def prunes(plan: SweepPlan, pruner: str) -> bool:
    """Whether a pruner drops anything."""
    setting = plan.pruners[pruner]
    return Recipe.load(setting.recipe).with_overrides(setting.set).tokens.method != "none"


def compose(
    plan: SweepPlan, quantizer: str, pruner: str, share: float, seed: int, overrides: tuple[str, ...] = ()
) -> Recipe:
    """The recipe of one row."""
    numbers, tokens = plan.quantizers[quantizer], plan.pruners[pruner]
    data = Recipe.load(numbers.recipe).to_dict() | {"tokens": Recipe.load(tokens.recipe).to_dict()["tokens"]}
    budget = [text.replace("{share}", f"{share:g}") for text in plan.budget] if prunes(plan, pruner) else []
    samples = [] if plan.samples is None else [f"calibration.samples={plan.samples}"]
    drawn = [*samples, f"calibration.seed={seed}", f"tokens.seed={seed}"]
    return Recipe.from_dict(data).with_overrides([*numbers.set, *tokens.set, *budget, *drawn, *overrides])
