"""Printed types round-trip; any other text is refused and never evaluated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.ir.sizes import Size
from qpcompile.ir.types import DTYPES, UNKNOWN, ValueType, parse_type

SIZES = st.sampled_from(["1", "48", "B", "S0", "S0+1", "Max(B,1)", "(S0//2)"]).map(Size)
TENSORS = st.builds(ValueType, st.sampled_from(list(DTYPES)), st.lists(SIZES, max_size=4).map(tuple))
NUMBERS = st.builds(
    ValueType, scalar=st.sampled_from([int, float, bool]), number=st.sampled_from(["7", "S0-1"]).map(Size)
)
LEAVES = st.one_of(TENSORS, NUMBERS)


def as_tuple(parts: list[ValueType]) -> ValueType:
    return ValueType(parts=tuple(parts))


@pytest.mark.parametrize(
    ("text", "dtype", "sizes"),
    [
        ("", None, ()),
        ("f32[]", torch.float32, ()),
        ("bool[B, 1, S0, S0]", torch.bool, ("B", "1", "S0", "S0")),
        ("i64[B, S1-(((650000*S1+999999)//1000000))]", torch.int64, ("B", "S1-(((650000*S1+999999)//1000000))")),
    ],
)
def test_tensors(text: str, dtype: torch.dtype | None, sizes: tuple[str, ...]) -> None:
    found = parse_type(text)
    assert (found.dtype, found.sizes) == (dtype, tuple(map(Size, sizes))) and str(found) == text


def test_numbers_and_tuples() -> None:
    pair = parse_type("(i8[B, 48], f32[B, 1])")
    assert [part.dtype for part in pair.tensors] == [torch.int8, torch.float32] and pair.dtype is None
    number, flag = parse_type("int S0+1"), parse_type("bool S0>3")
    assert (number.scalar, number.number) == (int, Size("S0+1")) and flag.scalar is bool
    assert parse_type("()") != UNKNOWN == parse_type("")


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3).map(as_tuple), max_leaves=5))
def test_printed_types_are_read_as_they_were(kind: ValueType) -> None:
    assert parse_type(str(kind)) == kind


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
        "int " + "+".join(["S0"] * 600),
        "f32[B, S0",
        "f32[B,S0]",
        "f32[B]]",
        "x32[B]",
        "float32[B]",
        "f32[B, __import__('os').getpid(), 4]",
        "(f32[B]",
        "((",
        "int ",
        "int\nS0",
        "f32[B, S0] # more",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_type(text)
