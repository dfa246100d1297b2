"""YAML text is read strictly and written plainly."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.errors import RecipeError
from qpcompile.yaml_text import parse, parse_mapping, write


@given(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.integers() | st.text() | st.none() | st.booleans()))
def test_what_is_written_is_read_back(data: dict[str, object]) -> None:
    assert parse_mapping(write(data), RecipeError) == data


@given(st.text(alphabet="a0:.-_+e[]{}!&*#|>'\"\n ,?%"))
def test_any_text_is_a_value_or_our_error(text: str) -> None:
    with contextlib.suppress(RecipeError):
        parse(text, RecipeError)


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E5", 1e5), ("-.5", -0.5), ("3.", 3.0), ("0.30", 0.3)])
def test_floats_without_a_dot_or_sign_are_floats(text: str, value: float) -> None:
    assert parse(text, RecipeError) == value


@pytest.mark.parametrize(("text", "value"), [("5", 5), ("none", "none"), ("null", None), ("1e", "1e"), ("e5", "e5")])
def test_other_scalars_stay_what_they_are(text: str, value: object) -> None:
    assert parse(text, RecipeError) == value and type(parse(text, RecipeError)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: 1, b: 2}",
        "a: 1\n'a': 2",
        "!!python/name:os.system x",
        "a: *b",
        "a: [",
        "\t",
        "\0",
        "!!bool x",
        "0b_",
        "!!timestamp x",
        "[" * 2000,
    ],
)
def test_text_that_hides_or_breaks_something_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse(text, RecipeError)


@pytest.mark.parametrize(
    "text", ["1e6", "0E0", "3.", "1", "null", "yes", "\x85", "é", "a: b", "", " x", "=", "<<", "~"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_mapping(write({text: text}), RecipeError) == {text: text}


def test_equal_values_are_written_out_twice() -> None:
    shared = [1, 2]
    assert write({"a": shared, "b": shared}) == "a: [1, 2]\nb: [1, 2]\n"
