"""Sizes in types: numbers and expressions of symbols, `48`, `S0`, `2*(S0-1)`. Only arithmetic is evaluated.

    size    =  an expression as sympy prints it, without spaces: names, numbers, + - * / // % ** and comparisons,
               parentheses, and functions by name (`Max(B,1)`)

One parser reads a size in two ways. As an expression, functions stay uninterpreted: `Max(B,1)` equals `Max(B,1)` and
depends on `B`. As a number, names are replaced by given sizes and a few functions are evaluated. A size may come from
anyone's file: everything that could take unbounded time or memory is refused.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]

# Length limit of a size.
MOST_CHARACTERS = 1500
_MOST_DIGITS = 20
_MOST_POWER = 8
_MOST_DEPTH = 40
_TOKEN = re.compile(
    rf"(?P<number>\d{{1,{_MOST_DIGITS}}}(?:\.\d{{1,{_MOST_DIGITS}}})?(?:e[+-]?\d{{1,3}})?)(?![\w.])"
    r"|(?P<name>[A-Za-z_]\w{0,63})|(?P<sign>\*\*|//|<=|>=|==|!=|[-+*/%()<>&|~,])",
    re.ASCII,
)
_PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    "*": operator.mul,
    "/": lambda left, right: left / right,
    "//": lambda left, right: left // right,
    "%": operator.mod,
}
_COMPUTED: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "floor": math.floor,
    "ceiling": math.ceil,
    "Mod": operator.mod,
}


@dataclass(frozen=True)
class Size:
    """One size of a tensor, or a number that is computed from sizes.

    form: the printed expression. Sizes of one graph are equal if their forms are.
    """

    form: str

    def __str__(self) -> str:
        return self.form

    @property
    def fixed(self) -> int | None:
        """The number, None if it depends on a symbol or is not a whole number."""
        return int(self.form) if self.form.isdecimal() else None

    @property
    def expression(self) -> sympy.Expr:
        """As a sympy expression; symbols have no assumptions. Raises ValueError if `form` is not a size."""
        return _expression(self.form)

    def value(self, sizes: Mapping[str, int]) -> int | None:
        """The number at the given sizes of symbols; None if it contains one that `sizes` lacks.

        Raises ValueError if `form` is not a size, or its value is not a whole number.
        """

        def call(name: str, inner: list[Fraction]) -> Fraction:
            if name not in _COMPUTED:
                raise ValueError(f"{name} of sizes is not computed")
            return Fraction(_COMPUTED[name](*inner))

        try:
            found = _Sizes(self.form, Fraction, lambda name: Fraction(sizes[name]), call).whole()
        except KeyError:
            return None
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{self.form[:80]!r} is not a size: {error}") from error
        if found.denominator != 1:
            raise ValueError(f"{self.form[:80]!r} is {found}, which is not a whole number")
        return int(found)


@functools.lru_cache(maxsize=4096)
def _expression(form: str) -> sympy.Expr:
    return _Sizes(form, _number, sympy.Symbol, lambda name, inner: sympy.Function(name)(*inner)).whole()


def _number(word: str) -> sympy.Expr:
    return sympy.Integer(int(word)) if word.isdecimal() else sympy.Float(word)


class _Sizes:
    """A recursive-descent parser: one method per precedence level, lowest first.

    number, name, call: constructors for numbers, names and function calls; arithmetic uses the values' operators.
    """

    def __init__(
        self, text: str, number: Callable[[str], Any], name: Callable[[str], Any], call: Callable[[str, list[Any]], Any]
    ) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a size of {len(text)} characters; at most {MOST_CHARACTERS} are read")
        self.text = text
        self.number, self.name, self.call = number, name, call
        self.place = 0
        self.depth = 0
        self.powers = 0
        self.kind, self.word = "", ""
        self._next()

    def whole(self) -> Any:
        """Parse the whole text."""
        found = self._compared()
        if self.kind:
            raise self._refusal()
        return found

    def _next(self) -> None:
        match = _TOKEN.match(self.text, self.place)
        if match is None and self.place < len(self.text):
            raise self._refusal()
        self.kind, self.word = (str(match.lastgroup), match[0]) if match else ("", "")
        self.place = match.end() if match else self.place

    def _take(self, *signs: str) -> str:
        """Consume the next token if it is one of `signs`."""
        if self.kind != "sign" or self.word not in signs:
            return ""
        sign = self.word
        self._next()
        return sign

    def _compared(self) -> Any:
        found = self._sum()
        while sign := self._take("<", ">", "<=", ">=", "==", "!=", "&", "|"):
            found = self.call(f"compare {sign}", [found, self._sum()])
        return found

    def _sum(self) -> Any:
        found = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            found = found + other if sign == "+" else found - other
        return found

    def _product(self) -> Any:
        found = self._signed()
        while sign := self._take(*_PRODUCTS):
            other = self._signed()
            if sign != "*" and other == 0:
                raise ValueError("a size is divided by 0")
            if sign == "%" and not getattr(other, "is_number", True):
                # Polynomial division takes unbounded time, and traced graphs contain remainders of numbers only.
                raise ValueError("a remainder of a division by more than a number")
            found = _PRODUCTS[sign](found, other)
        return found

    def _signed(self) -> Any:
        sign = self._take("-", "+", "~")
        if not sign:
            return self._power()
        inner = self._deeper(self._signed)
        return self.call("not", [inner]) if sign == "~" else -inner if sign == "-" else inner

    def _power(self) -> Any:
        powers = self.powers
        base = self._atom()
        if not self._take("**"):
            return base
        # Only what a product of sizes prints: a tower of powers would exhaust memory.
        power = int(self.word) if self.kind == "number" and self.word.isdecimal() else 0
        if self.powers > powers or not 0 < power <= _MOST_POWER:
            raise self._refusal()
        self.powers += 1
        self._next()
        return base**power

    def _atom(self) -> Any:
        kind, word = self.kind, self.word
        if kind == "number":
            self._next()
            return self.number(word)
        if kind == "name":
            self._next()
            return self.call(word, self._arguments()) if self.word == "(" else self.name(word)
        if self.word == "(":
            found = self._arguments()
            return found[0] if len(found) == 1 else self.call("tuple", found)
        raise self._refusal()

    def _arguments(self) -> list[Any]:
        self._take("(")
        found = [self._deeper(self._compared)]
        while self._take(","):
            found.append(self._deeper(self._compared))
        if not self._take(")"):
            raise self._refusal()
        return found

    def _deeper(self, level: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise ValueError("a size is nested too deep")
        found = level()
        self.depth -= 1
        return found

    def _refusal(self) -> ValueError:
        return ValueError(f"{self.text[:80]!r} is not a size")
