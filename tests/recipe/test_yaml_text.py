"""YAML text is read strictly and written plainly."""

import contextlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.errors import RecipeError
from qpcompile.recipe.yaml_text import SMALL, parse, parse_mapping, read, write


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
        "a\n- b: {",
        "a: 1\n---\nb: 2",
        "? [a]\n: b",
        "%YAML 9.9\n--- a",
        "\ud800",
    ],
)
def test_text_that_hides_or_breaks_something_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse(text, RecipeError)


def bomb(entry: str, deeper: str) -> str:
    """Forty lines, each of which expands to two copies of the previous line."""
    lines = [f"a0: &a0 {entry}", *(deeper.format(now=n, before=n - 1) for n in range(1, 40))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb("[x]", "a{now}: &a{now} [*a{before}, *a{before}]"), "line 1, column 5: anchors and aliases"),
        (bomb("{x: y}", "a{now}: &a{now} {{<<: [*a{before}, *a{before}]}}"), "anchors and aliases"),
        ("a: &a [*a]", "anchors and aliases"),
        ("a: {<<: {b: 1}}", "line 1, column 5: merge keys (<<)"),
        ("a: !!int 3", "line 1, column 4: tags (!)"),
        ("a: !secret 3", "tags (!)"),
        ("[" * 50_000, "more than 16 levels of nesting"),
        ("{a: " * 20 + "}" * 20, "more than 16 levels of nesting"),
        ("\n".join("  " * n + "a:" for n in range(40)), "more than 16 levels of nesting"),
        ("a: " + "9" * 5000, "a value of 5000 characters"),
        ("a: " + "9" * 41, "an integer of 41 characters"),
        ("a: 0x" + "f" * 500, "an integer of 502 characters"),
        ("a: " + ":".join(["59"] * 300), "an integer of 899 characters"),
        ("a: " + "x" * 1001, "a value of 1001 characters"),
        ("a: 1\n" * 20_000, "100000 characters; 65536 are read at most"),
    ],
)
def test_work_that_explodes_is_refused_by_name(text: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        parse(text, RecipeError)
    assert said in caught.value.what and len(caught.value.what) < 300
    assert time.monotonic() - started < 5


def test_limits_leave_room(tmp_path: Path) -> None:
    assert parse("a: " + "x" * 1000, RecipeError) == {"a": "x" * 1000}
    assert parse("a: " + "9" * 40, RecipeError) == {"a": int("9" * 40)}
    assert parse("[" * 16 + "]" * 16, RecipeError)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read(tmp_path / "bom.yaml", RecipeError) == "a: 1"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "wide").write_text("a: 1", encoding="utf-16")
    (tmp_path / "large").write_bytes(b"#" * (SMALL + 1))
    for name, said in {
        "pipe": "a folder, a pipe or a device",
        "folder": "a folder, a pipe or a device",
        "wide": "byte 0 is not UTF-8 text",
        "large": "has more than 65536 bytes",
        "none": "No such file",
        "n" * 300: "File name too long",
        "nul\0": "null byte",
    }.items():
        with pytest.raises(RecipeError) as caught:
            read(tmp_path / name, RecipeError)
        assert said in caught.value.what


@pytest.mark.parametrize(
    "text", ["1e6", "0E0", "3.", "1", "null", "yes", "\x85", "é", "a: b", "", " x", "=", "<<", "~"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_mapping(write({text: text}), RecipeError) == {text: text}


def test_equal_values_are_written_out_twice() -> None:
    shared = [1, 2]
    assert write({"a": shared, "b": shared}) == "a: [1, 2]\nb: [1, 2]\n"
