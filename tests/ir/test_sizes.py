"""Printed types round-trip; any other text is refused and never evaluated."""

from __future__ import annotations

import re

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from qpcompile.ir.sizes import size_expression, size_number, value_type

B, S0, S1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("B", "S0", "S1"))
NUMBERS = st.integers(1, 2**40).map(sympy.Integer)
SIZES = st.recursive(
    NUMBERS | st.sampled_from([B, S0, S1]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(inner, NUMBERS).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, NUMBERS).map(lambda pair: FloorDiv(*pair)),
        st.tuples(inner, NUMBERS).map(lambda pair: sympy.Mod(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.Max(*pair)),
    ),
    max_leaves=6,
)


def printed(size: sympy.Expr) -> str:
    """A size as printed in a type; no longer than what is read."""
    text = str(size).replace(" ", "")
    assume(len(text) <= 300 and not re.search(r"\d{21}", text))
    return text


@given(size=SIZES)
def test_what_the_printer_writes_is_read(size: sympy.Expr) -> None:
    text = printed(size)
    found = size_expression(text)
    assert set(map(str, found.free_symbols)) == set(map(str, size.free_symbols))
    assert value_type(f"f32[{text}, 48]").sizes == (text, "48")


@given(size=SIZES, values=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_arithmetic_is_that_of_the_size(size: sympy.Expr, values: tuple[int, int, int]) -> None:
    text = printed(size)
    if "Max" not in text and "Mod" not in text:
        by_name: dict[str, int] = dict(zip(("B", "S0", "S1"), values, strict=True))
        read = size_expression(text)
        left, right = (
            each.subs([(symbol, by_name[str(symbol)]) for symbol in each.free_symbols]) for each in (read, size)
        )
        assert left == right


@given(size=SIZES, values=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_number_is_that_of_the_size(size: sympy.Expr, values: tuple[int, int, int]) -> None:
    known: dict[str, int] = dict(zip(("B", "S0", "S1"), values, strict=True))
    assert size_number(printed(size), known) == size.subs([(each, known[str(each)]) for each in size.free_symbols])


def test_size_of_unknown_names_has_no_number() -> None:
    assert size_number("S0+S9", {"S0": 3}) is None
    assert size_number("2*(S0-1)**2", {"S0": 3}) == 8


def test_remainders_of_polynomials_are_not_taken() -> None:
    assert size_expression("(S0+7)%4") == size_expression("(S0+7)%4")
    power = "+".join("abcdefghij")
    with pytest.raises(ValueError, match="remainder"):
        size_expression(f"(({power})**8)%(({power}+k)**8+1)")


@pytest.mark.parametrize("text", ["S0/2", "S0>2", "sqrt(S0)", "S0%0", "Mod(S0,0)", "Max(S0)", "((9**8)**8)**8", "~S0"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        size_number(text, {"S0": 3})


@pytest.mark.parametrize(
    ("text", "kind", "sizes"),
    [
        ("", "", ()),
        ("f32[]", "f32", ()),
        ("bool[B, 1, S0, S0]", "bool", ("B", "1", "S0", "S0")),
        ("i64[B, S1-(((650000*S1+999999)//1000000))]", "i64", ("B", "S1-(((650000*S1+999999)//1000000))")),
    ],
)
def test_tensors(text: str, kind: str, sizes: tuple[str, ...]) -> None:
    found = value_type(text)
    assert (found.dtype, found.sizes) == (kind, sizes)


def test_numbers_and_tuples() -> None:
    pair = value_type("(i8[B, 48], f32[B, 1])")
    assert [part.dtype for part in pair.tensors] == ["i8", "f32"] and pair.dtype == ""
    assert value_type("int S0+1").number == "S0+1" and value_type("bool S0>3").kind == "bool"


@pytest.mark.parametrize(
    "text",
    [
        "f32[__import__('os')]",
        "int S0.x",
        "int lambda:1",
        "int 9**9**9",
        "int S0**9",
        "int S0//0",
        "int S0%0",
        "int " + "(" * 60 + "S0" + ")" * 60,
        "int 1" + "0" * 30,
        "int " + "+".join(["S0"] * 200),
        "f32[B, S0",
        "f32[B,S0]",
        "f32[B]]",
        "x32[B]",
        "(f32[B]",
        "((",
        "int ",
        "int\nS0",
        "f32[B, S0] # more",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        value_type(text)
