"""The recipe: all compile options in one versioned YAML file, fully validated when read."""

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from qpcompile.errors import RecipeError
from qpcompile.nested import is_dict, is_mapping
from qpcompile.recipe import yaml_text
from qpcompile.recipe.messages import problems
from qpcompile.recipe.quality import QualityScheme
from qpcompile.recipe.quantize import MOST_SAMPLES, MOST_SEED, QuantizeScheme, Section
from qpcompile.recipe.tokens import TokenScheme

_DO = "correct the keys above; the recipe reference in the documentation lists every key"
_PLAIN = "write a mapping of keys to plain values, as the recipe reference in the documentation shows"


class CalibrationScheme(Section):
    """How much of the calibration data is used."""

    samples: int = Field(
        default=128,
        ge=1,
        le=MOST_SAMPLES,
        description="Maximum number of samples; fewer are used, and reported, if fewer are given. Passes iterate over "
        "all of them.",
    )
    seed: int = Field(
        default=0, ge=0, le=MOST_SEED, description="Seed of the selection of samples. Generators take 63 bits."
    )
    after_cuts: bool = Field(
        default=False, description="Recollect statistics for the weight solver after the cuts, on kept tokens."
    )


class Recipe(Section):
    """The options of one compile: quantization, visual tokens, numerics, calibration, quality."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    quantize: QuantizeScheme | None = Field(default=None, description="What is quantized; null quantizes nothing.")
    tokens: TokenScheme = Field(default=TokenScheme(), description="Which visual tokens are kept.")
    order: Literal["joint", "quantize_then_prune", "prune_then_quantize"] = Field(
        default="joint",
        description="joint plans cuts for the quantized model. Stage-wise orders do not: equal drops, no residual "
        "in the score; prune_then_quantize profiles full precision and calibrates after the cuts.",
    )
    numerics: Literal["exact", "fast"] = Field(
        default="fast",
        description="exact sums in float64 and rounds to float32 once, so that the compiled module and onnxruntime "
        "produce identical codes: for tests and audits, in float32 on the CPU. fast sums in float32; docs/numerics.md "
        "has its bound against exact.",
    )
    calibration: CalibrationScheme = Field(default=CalibrationScheme(), description="How calibration data is used.")
    quality: QualityScheme = Field(
        default=QualityScheme(), description="How agreement with full precision is measured, and how much is demanded."
    )

    @property
    def recalibrates(self) -> bool:
        """Whether statistics are recollected after the cuts."""
        return self.calibration.after_cuts or self.order == "prune_then_quantize"

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_as_ours(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Raise one RecipeError for all problems, however the recipe is constructed."""
        try:
            return handler(data)
        except ValidationError as error:
            lines = problems(cls, error, data)
            keys = "1 key" if len(lines) == 1 else f"{len(lines)} keys"
            raise RecipeError(
                "\n  ".join([f"the recipe has {keys} that cannot be used:", *lines]), where=cls.__name__, do=_DO
            ) from error

    @classmethod
    def load(cls, source: "str | PathLike[str] | Recipe") -> "Recipe":
        """A recipe itself, a preset's name, or a path. A name with no slash and no dot is a preset's."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, str) and source in preset_names():
            text = (resources.files("qpcompile.recipe") / "presets" / f"{source}.yaml").read_text(encoding="utf-8")
            return cls.from_yaml(text, where=f"preset {source}")
        if not _is_path(source):
            raise RecipeError(
                f"a recipe is a preset's name, a path or a Recipe, not a {type(source).__name__}",
                where="recipe",
                do="make one of plain dicts with Recipe.from_dict",
            )
        path = Path(source)
        where = yaml_text.short(str(path))
        try:
            there = path.exists()
        except (OSError, ValueError):
            there = True  # reading it says why not
        if not there and (isinstance(source, str) and path.name == source and not path.suffix):
            raise _no_such_preset(where)
        do = f"give a YAML file, or one of the presets {', '.join(preset_names())}{_close(path.stem)}"
        text = yaml_text.read(path, lambda what: RecipeError(f"the recipe {what}", where=where, do=do))
        return cls.from_yaml(text, where=where)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "recipe text") -> "Recipe":
        """Parse the recipe in `text`; `where` names its origin in errors."""
        data = yaml_text.parse_mapping(text, lambda what: RecipeError(what, where=where, do=_PLAIN))
        return cls.from_dict(data, where=where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> "Recipe":
        """The recipe from plain dicts, lists and scalars; `where` names its origin in errors."""
        if not is_mapping(data):
            raise RecipeError(f"a mapping is needed, got {type(data).__name__}", where=where or "recipe", do=_PLAIN)
        try:
            return cls.model_validate(dict(data))
        except RecipeError as error:
            raise RecipeError(error.what, where=where or error.where, do=error.do) from error.__cause__

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars with every key, defaults too."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML text with every key, defaults too; `from_yaml` parses it to an equal recipe."""
        return yaml_text.write(self.to_dict())

    def with_overrides(self, overrides: Iterable[str]) -> "Recipe":
        """A new recipe with `path=value` settings (value in YAML), e.g. `tokens.keep=0.5`; all checked together."""
        overrides = list(overrides)
        data = self.to_dict()
        for override in overrides:
            _set(data, override)
        return Recipe.from_dict(data, where=yaml_text.short(f"overrides {', '.join(overrides)}") if overrides else None)


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("qpcompile.recipe") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _is_path(source: object) -> bool:
    return isinstance(source, str | PathLike)


def _no_such_preset(name: str) -> RecipeError:
    """The error for a name that is neither a preset nor a file."""
    return RecipeError(
        f"no preset and no file is named {name!r}",
        where="recipe",
        do=f"presets: {', '.join(preset_names())}{_close(name)}; or give a YAML file",
    )


def _close(name: str) -> str:
    """A suggestion of presets with similar names, if there are any."""
    close = difflib.get_close_matches(name, preset_names(), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _set(data: dict[str, Any], override: str) -> None:
    """Put one `path=value` into nested dicts; a section that is null becomes one with defaults."""
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    said = repr(yaml_text.short(override))
    do = "write it as tokens.keep=0.5"
    if not equals or not key or not all(sections):
        raise RecipeError(f"the override {said} has no key or no value", where="overrides", do=do)
    for depth, section in enumerate(sections, 1):
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not is_dict(data):
            at = yaml_text.short(".".join(sections[:depth]))
            raise RecipeError(
                f"the override {said} goes below {at}, which is a value, not a section", where="overrides", do=do
            )
    data[key] = yaml_text.parse(text, lambda what: RecipeError(what, where=f"override {said}", do=do))
