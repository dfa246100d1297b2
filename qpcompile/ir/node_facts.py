"""Typed annotations (facts) of nodes, under one metadata key. Only this file reads or writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

_KEY = "qpcompile"

Role = Literal["activation", "weight", "key", "value"]


@dataclass(frozen=True)
class StubFact:
    """A quantization stub: its site (dotted module name), the role of its value, and its layer.

    clip: for an activation, the clip ratio searched for this site; bits: the bits assigned to this site. None to use
    the recipe's.
    """

    site: str
    role: Role
    layer: int | None
    clip: float | None = None
    bits: int | None = None


@dataclass(frozen=True)
class QuantizedFact:
    """A node created by a quantization pass: the sites it serves and its kernel."""

    sites: tuple[str, ...]
    kernel: str


@dataclass(frozen=True)
class NumeratorFact:
    """A product whose second operand is the numerator of a cut's keep ratio; `layer` is that cut's."""

    layer: int


@dataclass(frozen=True)
class ScoreFact:
    """One of several scores that a search has put at the cut after `layer`."""

    layer: int
    name: str


Fact = StubFact | QuantizedFact | NumeratorFact | ScoreFact


def set_fact(node: fx.Node, fact: Fact) -> None:
    """Attach the fact to the node, replacing an earlier one."""
    node.meta[_KEY] = fact


def stub_fact(node: fx.Node) -> StubFact | None:
    """The stub fact of a node, if it is a stub."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, StubFact) else None


def quantized_fact(node: fx.Node) -> QuantizedFact | None:
    """The quantization fact of a node, if it has one."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, QuantizedFact) else None


def numerator_fact(node: fx.Node) -> NumeratorFact | None:
    """The numerator fact of a node, if it has one."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, NumeratorFact) else None


def score_fact(node: fx.Node) -> ScoreFact | None:
    """The score fact of a node, if it has one."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, ScoreFact) else None
