"""The description of allowed values is derived from the schema that is checked."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from qpcompile.recipe.messages import allowed, problems


class Inner(BaseModel):
    """A section."""

    size: int = Field(default=1, ge=1, lt=9)


class Outer(BaseModel, extra="forbid"):
    """All kinds of keys."""

    flag: bool = True
    word: Literal["a", "b"] = "a"
    either: Literal["auto"] | list[int] = "auto"
    pair: tuple[int, float] = (1, 2.0)
    words: list[Literal["a", "b"]] = []
    maybe: Inner | None = None
    names: dict[str, str] = {}
    items: list[Inner] = []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("flag", "true | false"),
        ("word", "a | b"),
        ("either", "auto | list of integer"),
        ("pair", "[integer, number]"),
        ("words", "list of (a | b)"),
        ("maybe", "a section with the keys size | null"),
        ("names", "a mapping"),
        ("items", "list of a section with the keys size"),
    ],
)
def test_words_for_each_kind(key: str, words: str) -> None:
    schema = Outer.model_json_schema()
    assert allowed(schema["properties"][key], schema) == words


def test_bounds_are_said() -> None:
    schema = Inner.model_json_schema()
    assert allowed(schema["properties"]["size"], schema) == "integer >= 1 and < 9"


def test_one_line_per_wrong_place() -> None:
    data = {"either": ["x", "y"], "maybe": {"size": 9}, "items": [{}, {"size": "x" * 100}], "wrd": 1, "pair": [1]}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    assert problems(Outer, caught.value, data) == [
        'either: given ["x", "y"]; allowed: auto | list of integer',
        "pair: given [1]; allowed: [integer, number]",
        "maybe.size: given 9; allowed: integer >= 1 and < 9",
        f'items.1.size: given "{"x" * 76}...; allowed: integer >= 1 and < 9',
        "wrd: unknown key; did you mean word or words?",
    ]


def test_garbage_is_counted_not_listed() -> None:
    data = {f"key{number}": 1 for number in range(5000)}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    lines = problems(Outer, caught.value, data)
    assert lines[0].startswith("key0: unknown key") and sum(map(len, lines)) < 1500
    assert lines[-1] == f"... and {5000 - len(lines) + 1} more"


def test_values_that_cannot_be_shown() -> None:
    circle: list[object] = []
    circle.append(circle)
    data = {"flag": circle, "word": 10**5000, "pair": 1, "k" * 5000: 1, "line\nbreak": 1}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    lines = problems(Outer, caught.value, data)
    assert lines[:3] == [
        "flag: given a list that cannot be shown; allowed: true | false",
        "word: given a int that cannot be shown; allowed: a | b",
        "pair: given 1; allowed: [integer, number]",
    ]
    assert lines[3].startswith("kkk") and len(lines[3]) < 400
    assert lines[4].startswith('"line\\nbreak": unknown key')
