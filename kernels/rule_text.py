"""Parser of tensor forms in rules: `f32[N, 1]`, `f|bool[B|1, Hq|1, T, S]?`, `=dtype[..., N]`. See kernels/rules.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
FLOATS = frozenset(TYPES[name] for name in ("f16", "bf16", "f32", "f64"))
_SETS = {"f": FLOATS, "i": frozenset({torch.int32, torch.int64})}
_TENSOR = re.compile(
    r"(?:=(?P<like>[\w+]+)|(?P<types>[\w|]+))\[(?P<leading>[~*]?\.{3})?(?:, )?(?P<sizes>.*)\](?P<optional>\??)"
)
_COMMA = re.compile(r", (?![^(]*\))")
# A size computed from named ones.
_FORMS: tuple[tuple[re.Pattern[str], Callable[..., Any]], ...] = (
    (re.compile(r"ceil\((\w+)/2\)"), lambda size: (size + 1) // 2),
    (re.compile(r"bytes\((\w+), (\w+)\)"), lambda size, bits: (size * bits + 7) // 8),
    (re.compile(r"groups\((\w+), (\w+)\)"), lambda size, group: size // group if group else 1),
    (
        re.compile(r"groups\((\w+)\*(\w+), (\w+)\)"),
        lambda left, right, group: left * right // group if group else 1,
    ),
    (re.compile(r"(\w+)\*(\w+)"), lambda left, right: left * right),
    (re.compile(r"(\w+)\+(\w+)"), lambda left, right: left + right),
)


@dataclass(frozen=True)
class SizePattern:
    """One size of a tensor: a number, a named size, or `function` of named ones.

    or_one: 1 matches too.
    """

    text: str
    names: tuple[str, ...] = ()
    number: int | None = None
    function: Callable[..., Any] | None = None
    or_one: bool = False

    def value(self, sizes: dict[str, Any]) -> Any:
        """The size if the named ones are known, else None."""
        if self.number is not None:
            return self.number
        values = [sizes.get(name) for name in self.names]
        if any(value is None for value in values):
            return None
        return values[0] if self.function is None else self.function(*values)


@dataclass(frozen=True)
class Form:
    """A tensor form in a rule.

    leading: "...", "~..." (broadcasts to that), "*..." (any) or "". like: the operand whose type it has, or ""; for
    results also "x+weight", the promoted type of both.
    """

    text: str
    types: frozenset[torch.dtype]
    like: str
    leading: str
    sizes: tuple[SizePattern, ...]
    optional: bool


def read_form(text: str) -> Form:
    """The form that `text` describes."""
    match = _TENSOR.fullmatch(text)
    assert match is not None, f"{text!r} is not a tensor form"
    types: frozenset[torch.dtype] = frozenset()
    for name in (match["types"] or "").split("|") if match["types"] else ():
        types |= _SETS[name] if name in _SETS else {TYPES[name]}
    sizes = tuple(_size(each) for each in _COMMA.split(match["sizes"]) if each)
    return Form(text, types, match["like"] or "", match["leading"] or "", sizes, bool(match["optional"]))


def _size(text: str) -> SizePattern:
    if text.isdecimal():
        return SizePattern(text, number=int(text))
    for pattern, function in _FORMS:
        if match := pattern.fullmatch(text):
            return SizePattern(text, match.groups(), function=function)
    name = text.removesuffix("|1")
    assert name.isidentifier(), f"{text!r} is not a size"
    return SizePattern(text, (name,), or_one=name != text)
