"""Products of codes promise the bits of the quantizer that they read; GPU kernels pack codes by that promise."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from qpcompile.ir.edit import calls
from qpcompile.ir.operators import EXPERT_LINEAR_INT, LINEAR_INT, QUANTIZERS
from qpcompile.ir.program import Graph

# The place of the bits among the operands of linear_int and expert_linear_int; quantizers have theirs last.
BITS = 6


def other_bits(graph: Graph) -> Iterator[str]:
    """Every product that promises other bits than its quantizer makes, as text."""
    for node in calls(graph, LINEAR_INT, EXPERT_LINEAR_INT):
        codes, promised = node.args[0], node.args[BITS]
        pair = codes.args[0] if isinstance(codes, fx.Node) and codes.target is operator.getitem else None
        if isinstance(pair, fx.Node) and pair.target in QUANTIZERS and pair.args[-1] != promised:
            yield f"{node.name} takes codes of {promised} bits, {pair.name} makes them of {pair.args[-1]}"
