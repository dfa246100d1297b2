"""Types of values in graphs: `f32[B, S0, 48]`, `int S0-1`, `(i8[B, 48], f32[B, 1])`.

    type    =  ""  |  dtype "[" [size {", " size}] "]"  |  kind " " size  |  "(" type {", " type} ")"
    kind    =  "int" | "float" | "bool"

A traced graph has fake values, from which types are derived; a graph that was read from a file has the types that the
file records, parsed once. `B` is the symbolic size that most often comes first in a shape, the others are `S0`, `S1`,
... in order of appearance.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import expression, sym_node
from qpcompile.ir.sizes import Size
from qpcompile.nested import is_list

# The metadata key of the recorded type (ValueType) of a node that was read from a file: it has no fake value.
TYPE = "value_type"
DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
# Length limit of a printed type.
MOST_CHARACTERS = 6000
_MOST_DEPTH = 40
_NUMBERS: dict[str, type] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class ValueType:
    """The type of a value; without any field: unknown.

    dtype and sizes: of a tensor. scalar and number: of a number (int, float or bool). parts: of a tuple.
    """

    dtype: torch.dtype | None = None
    sizes: tuple[Size, ...] = ()
    scalar: type | None = None
    number: Size | None = None
    parts: tuple[ValueType, ...] | None = None

    def __str__(self) -> str:
        if self.dtype is not None:
            return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.sizes))}]"
        if self.parts is not None:
            return f"({', '.join(map(str, self.parts))})"
        return "" if self.scalar is None else f"{self.scalar.__name__} {self.number}"

    @property
    def is_known(self) -> bool:
        return self != UNKNOWN

    @property
    def tensors(self) -> tuple[ValueType, ...]:
        """The tensors of a tuple, or the tensor itself, in order."""
        if self.dtype is not None:
            return (self,)
        return tuple(tensor for part in self.parts or () for tensor in part.tensors)


UNKNOWN = ValueType()
BATCH = Size("B")


def dtype_name(dtype: torch.dtype) -> str:
    """The printed name of a dtype: `f32`, `bf16`, `i8`, and torch's name for rare ones."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


_BY_NAME = {dtype_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def value_types(graph: Graph) -> dict[fx.Node, ValueType]:
    """The type of each value; `UNKNOWN` for one without a recorded type or fake value."""
    names = _symbol_names(graph)
    return {
        node: node.meta[TYPE] if TYPE in node.meta else _type_of(node.meta.get("val"), names)
        for node in graph.nodes
        if node.op != "output"
    }


def type_of(value: Any) -> ValueType:
    """The type of a value with concrete sizes."""
    return _type_of(value, {})


def symbol_examples(graph: Graph) -> dict[str, int]:
    """The example value (hint) of each printed symbol, from the sample the graph was traced with, if it has one."""
    sizes = {
        expression(size): sym_node(size)
        for node in graph.nodes
        for tensor in _tensors(node.meta.get("val"))
        for size in tensor.shape
        if isinstance(size, torch.SymInt)
    }
    known: dict[Any, int] = {}
    for node in sizes.values():
        known |= node.shape_env.backed_var_to_val
    return {str(name): int(known[symbol]) for symbol, name in _symbol_names(graph).items() if symbol in known}


@functools.lru_cache(maxsize=4096)
def parse_type(text: str) -> ValueType:
    """Parse a printed type. Raises ValueError for any other text."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a type of {len(text)} characters; at most {MOST_CHARACTERS} are read")
    found, rest = _type(text, 0)
    if rest:
        raise ValueError(f"{text!r} is not a type")
    return found


def _type(text: str, depth: int) -> tuple[ValueType, str]:
    """Parse the type at the start of a text; returns it and the remaining text."""
    if depth > _MOST_DEPTH:
        raise ValueError("a type is nested too deep")
    if text.startswith("("):
        return _tuple(text, depth)
    word = re.match(r"\w*", text, re.ASCII)
    kind = word[0] if word else ""
    rest = text[len(kind) :]
    if rest.startswith("[") and kind in _BY_NAME:
        inside, closed, after = rest[1:].partition("]")
        sizes = tuple(map(_checked, inside.split(", "))) if inside else ()
        if closed:
            return ValueType(_BY_NAME[kind], sizes), after
    elif rest.startswith(" ") and kind in _NUMBERS:
        number = rest[1 : 1 + _length(rest[1:])]
        return ValueType(scalar=_NUMBERS[kind], number=_checked(number)), rest[1 + len(number) :]
    elif not kind:
        return UNKNOWN, text
    raise _not_a_type(text)


def _length(text: str) -> int:
    """Where a number at the start of a text ends: before `, ` and before the bracket of its tuple."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth < 0 or (depth == 0 and text.startswith(", ", place)):
            return place
    return len(text)


def _checked(form: str) -> Size:
    """The size, once its form has been parsed."""
    size = Size(form)
    _ = size.expression
    return size


def _not_a_type(text: str) -> ValueError:
    return ValueError(f"{text[:80]!r} is not a type")


def _tuple(text: str, depth: int) -> tuple[ValueType, str]:
    parts: list[ValueType] = []
    rest = text[1:]
    while not rest.startswith(")"):
        if parts:
            if not rest.startswith(", "):
                raise _not_a_type(text)
            rest = rest[2:]
        part, after = _type(rest, depth + 1)
        if len(after) == len(rest) and not after.startswith((")", ", ")):
            raise _not_a_type(text)
        parts.append(part)
        rest = after
    return ValueType(parts=tuple(parts)), rest[1:]


def _type_of(value: Any, names: dict[Any, Any]) -> ValueType:
    if isinstance(value, torch.Tensor):
        return ValueType(value.dtype, tuple(_size(size, names) for size in value.shape))
    if is_list(value):
        return ValueType(parts=tuple(_type_of(item, names) for item in value))
    for kind, symbolic in ((bool, torch.SymBool), (int, torch.SymInt), (float, torch.SymFloat)):
        if isinstance(value, (kind, symbolic)):
            return ValueType(scalar=kind, number=_size(value, names))
    return UNKNOWN


def _size(size: Any, names: dict[Any, Any]) -> Size:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Size(str(size))
    return Size(str(sym_node(size).expr.xreplace(names)).replace(" ", ""))


def _symbol_names(graph: Graph) -> dict[Any, Any]:
    """A short name for every symbol in the shapes of a graph."""
    leads: Counter[Any] = Counter()
    order: dict[Any, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = [tuple(tensor.shape) for tensor in _tensors(value)]
        leads.update(expression(size[0]) for size in sizes if size and isinstance(size[0], torch.SymInt))
        order |= dict.fromkeys(symbol for size in (*sizes, (value,)) for item in size for symbol in _symbols(item))
    first = next((symbol for symbol, _ in leads.most_common() if symbol in order), None)
    ranked = [symbol for symbol in order if symbol != first]
    # The new symbols keep the assumptions of the old ones (integer, positive): expressions keep their form.
    names = {symbol: sympy.Symbol(f"S{rank}", **symbol.assumptions0) for rank, symbol in enumerate(ranked)}
    return names | ({} if first is None else {first: sympy.Symbol("B", **first.assumptions0)})


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif is_list(value):
        for item in value:
            yield from _tensors(item)


def _symbols(size: Any) -> list[Any]:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return []
    key: Callable[[Any], str] = str
    return sorted(sym_node(size).expr.free_symbols, key=key)
