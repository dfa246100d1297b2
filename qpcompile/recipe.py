"""What a user asks for: one versioned YAML file, checked in full when it is read."""

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from qpcompile import yaml_text
from qpcompile.errors import RecipeError
from qpcompile.recipe_schema import QuantizeScheme, Section
from qpcompile.schema_text import problems
from qpcompile.token_scheme import TokenScheme

_DO = "correct the keys above; the recipe reference in the documentation lists every key"


class CalibrationScheme(Section):
    """How much of the calibration data is used."""

    samples: int = Field(
        default=128, ge=1, description="Samples used at most; fewer are used, and reported, when fewer come."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of samples.")
    after_cuts: bool = Field(
        default=False, description="Collect what weights are solved for once more, on the tokens that cuts leave."
    )


class Recipe(Section):
    """One compile: what is quantized, which visual tokens are kept, what calibrates both."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    quantize: QuantizeScheme | None = Field(default=None, description="What is quantized; null quantizes nothing.")
    tokens: TokenScheme = Field(default=TokenScheme(), description="Which visual tokens are kept.")
    order: Literal["joint", "quantize_then_prune", "prune_then_quantize"] = Field(
        default="joint",
        description="joint plans cuts with the quantizer in view. Stage-wise orders do not: equal drops, no residual "
        "in the score; prune_then_quantize profiles full precision and calibrates behind the cuts.",
    )
    calibration: CalibrationScheme = Field(default=CalibrationScheme(), description="How calibration data is used.")

    @property
    def recalibrates(self) -> bool:
        """Whether statistics are collected once more behind the cuts."""
        return self.calibration.after_cuts or self.order == "prune_then_quantize"

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_as_ours(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """One RecipeError for everything that is wrong, whichever way the recipe is made."""
        try:
            return handler(data)
        except ValidationError as error:
            lines = problems(cls, error, data)
            keys = "1 key" if len(lines) == 1 else f"{len(lines)} keys"
            raise RecipeError("\n  ".join([f"the recipe has {keys} that cannot be used:", *lines]), do=_DO) from error

    @classmethod
    def load(cls, source: "str | PathLike[str] | Recipe") -> "Recipe":
        """A recipe itself, a preset's name, or a path. A name with no slash and no dot is a preset's."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, str) and source in preset_names():
            text = (resources.files("qpcompile") / "presets" / f"{source}.yaml").read_text(encoding="utf-8")
            return cls.from_yaml(text, where=f"preset {source}")
        path = Path(source)
        if isinstance(source, str) and path.name == source and not path.suffix and not path.is_file():
            raise _no_such_preset(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"the recipe cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                do=f"give a YAML file, or one of the presets {', '.join(preset_names())}",
            ) from error
        return cls.from_yaml(text, where=str(path))

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "recipe text") -> "Recipe":
        """The recipe written in `text`; `where` names its origin in errors."""
        return cls.from_dict(yaml_text.parse_mapping(text, lambda what: RecipeError(what, where=where)), where=where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> "Recipe":
        """The recipe of plain dicts, lists and scalars; `where` names its origin in errors."""
        try:
            return cls.model_validate(dict(data))
        except RecipeError as error:
            raise RecipeError(error.what, where=where, do=error.do) from error.__cause__

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars with every key, defaults too."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML text with every key, defaults too: what `from_yaml` reads back to an equal recipe."""
        return yaml_text.write(self.to_dict())

    def with_overrides(self, overrides: Iterable[str]) -> "Recipe":
        """A new recipe with `path=value` settings (value in YAML), e.g. `tokens.keep=0.5`; all checked together."""
        overrides = list(overrides)
        data = self.to_dict()
        for override in overrides:
            _set(data, override)
        return Recipe.from_dict(data, where=f"overrides {', '.join(overrides)}" if overrides else None)


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("qpcompile") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _no_such_preset(name: str) -> RecipeError:
    """The error for a name that is neither a preset nor a file."""
    close = difflib.get_close_matches(name, preset_names(), n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return RecipeError(
        f"no preset and no file is named {name!r}",
        do=f"{hint}presets: {', '.join(preset_names())}; or give a YAML file",
    )


def _set(data: dict[str, Any], override: str) -> None:
    """Put one `path=value` into nested dicts; a section that is null becomes one with defaults."""
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key or not all(sections):
        raise RecipeError(f"the override {override!r} has no key or no value", do="write it as tokens.keep=0.5")
    for depth, section in enumerate(sections, 1):
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            at = ".".join(sections[:depth])
            raise RecipeError(f"the override {override!r} goes below {at}, which is a value, not a section")
    data[key] = yaml_text.parse(text, lambda what: RecipeError(what, where=f"override {override!r}"))
