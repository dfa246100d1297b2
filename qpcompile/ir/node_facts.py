"""What passes know about single nodes: typed facts under one metadata key. Only this file reads or writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

_KEY = "qpcompile"

Role = Literal["activation", "weight", "key", "value"]


@dataclass(frozen=True)
class StubFact:
    """A quant stub: the site it belongs to (dotted module name), what flows through it, and the layer it is in.

    clip: for an activation, the clip ratio found for this site; None where it is the recipe's.
    """

    site: str
    role: Role
    layer: int | None
    clip: float | None = None


@dataclass(frozen=True)
class QuantizedFact:
    """A node that a quantization pass made: the sites it serves and the kernel that runs there."""

    sites: tuple[str, ...]
    kernel: str


Fact = StubFact | QuantizedFact


def set_fact(node: fx.Node, fact: Fact) -> None:
    """Attach the fact to the node, in place of an earlier one."""
    node.meta[_KEY] = fact


def stub_fact(node: fx.Node) -> StubFact | None:
    """The stub fact of a node, if it is a stub."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, StubFact) else None


def quantized_fact(node: fx.Node) -> QuantizedFact | None:
    """What a quantization pass noted on a node."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, QuantizedFact) else None
