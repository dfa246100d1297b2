"""Fuse residual adds into the preceding linear's epilogue in a bound graph.

    %y = linear_w4a4(%q, %scale, @w, @w_scale, @bias, bf16); %h = add(%x, %y)
      -> %h = linear_w4a4(%q, %scale, @w, @w_scale, @bias, bf16, %x)

The linear's result is rounded before the add, like in two operators: results are bit-identical. Linears with another
reader, or whose result differs in type or shape from the residual, are not fused.
"""

from __future__ import annotations

from torch import fx

from qpcompile.ir.edit import aten, calls, is_call
from qpcompile.ir.operators import LINEAR_W4A4
from qpcompile.ir.program import Graph
from qpcompile.ir.types import value_types


def join_residuals(graph: Graph) -> int:
    """Fuse every residual add after a linear on 4-bit codes; returns the number of fused adds."""
    types, joined = value_types(graph), 0
    for add in list(calls(graph, aten.add.Tensor)):
        if len(add.args) != 2 or add.kwargs or not all(isinstance(term, fx.Node) for term in add.args):
            continue
        for y, x in (add.args, add.args[::-1]):
            assert isinstance(y, fx.Node) and isinstance(x, fx.Node)
            alike = types[add].dtype is not None and types[x] == types[add] == types[y]
            if alike and is_call(y, LINEAR_W4A4) and len(y.users) == 1:
                add.target, add.args = LINEAR_W4A4, (*y.args, x)
                graph.module.graph.erase_node(y)
                joined += 1
                break
    return joined
