"""Common-subexpression elimination: a call with the same operator and arguments as an earlier one is replaced by it.

torch's CSEPass takes 1, 1.0 and True for equal arguments, and merges across operators that write to a tensor.
"""

from __future__ import annotations

import torch
from torch import fx

from qpcompile.ir.overloads import is_overload, schema
from qpcompile.ir.program import Graph


def merge_equal_calls(graph: Graph) -> bool:
    """Merge equal calls; returns whether there were any. The module is not recompiled: `edit.tidy` does that.

    Random operators are kept, and nothing is merged across an operator that writes to a tensor.
    """
    merged = False
    first: dict[tuple[object, str], fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or _is_random(node):
            continue
        if _writes(node):
            first.clear()
            continue
        # As text, since 1, 1.0 and True are equal in Python but not in torch; a node prints as its name.
        key = (node.target, f"{node.args} {sorted(node.kwargs.items())}")
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.module.graph.erase_node(node)
            merged = True
    return merged


def _is_random(node: fx.Node) -> bool:
    return is_overload(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags


def _writes(node: fx.Node) -> bool:
    return is_overload(node.target) and schema(node.target).is_mutable
