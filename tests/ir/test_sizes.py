"""Sizes round-trip and are computed; any other text is refused and never evaluated."""

from __future__ import annotations

import re

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from qpcompile.ir.sizes import Size
from qpcompile.ir.types import parse_type

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
    found = Size(text).expression
    assert set(map(str, found.free_symbols)) == set(map(str, size.free_symbols))
    assert parse_type(f"f32[{text}, 48]").sizes == (Size(text), Size("48"))


@given(size=SIZES, values=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_arithmetic_is_that_of_the_size(size: sympy.Expr, values: tuple[int, int, int]) -> None:
    text = printed(size)
    if "Max" not in text and "Mod" not in text:
        by_name: dict[str, int] = dict(zip(("B", "S0", "S1"), values, strict=True))
        read = Size(text).expression
        left, right = (
            each.subs([(symbol, by_name[str(symbol)]) for symbol in each.free_symbols]) for each in (read, size)
        )
        assert left == right


@given(size=SIZES, values=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_number_is_that_of_the_size(size: sympy.Expr, values: tuple[int, int, int]) -> None:
    known: dict[str, int] = dict(zip(("B", "S0", "S1"), values, strict=True))
    assert Size(printed(size)).value(known) == size.subs([(each, known[str(each)]) for each in size.free_symbols])


def test_size_of_unknown_names_has_no_number() -> None:
    assert Size("S0+S9").value({"S0": 3}) is None
    assert Size("2*(S0-1)**2").value({"S0": 3}) == 8


def test_remainders_of_polynomials_are_not_taken() -> None:
    assert Size("(S0+7)%4").expression == Size("(S0+7)%4").expression
    power = "+".join("abcdefghij")
    with pytest.raises(ValueError, match="remainder"):
        _ = Size(f"(({power})**8)%(({power}+k)**8+1)").expression


@pytest.mark.parametrize("text", ["S0/2", "S0>2", "sqrt(S0)", "S0%0", "Mod(S0,0)", "Max(S0)", "((9**8)**8)**8", "~S0"])
def test_what_is_not_a_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Size(text).value({"S0": 3})


def test_only_numbers_are_fixed() -> None:
    assert [Size(text).fixed for text in ("48", "0", "S0", "S0+1")] == [48, 0, None, None]
