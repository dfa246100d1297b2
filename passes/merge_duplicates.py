"""Common-subexpression elimination: a call with the same operator and arguments as an earlier one is replaced by it.

    %a = aten::unsqueeze(%i, 1)
    %b = aten::unsqueeze(%i, 1)      becomes      %a = aten::unsqueeze(%i, 1)
    %y = aten::add(%a, %b)                        %y = aten::add(%a, %a)

Token cuts gather several values with the same indices, and a 4-bit cache appends the new token once for attention and
once for the returned cache. Random operators are kept, and nothing is merged across an operator that writes to a
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import tidy
from qpcompile.ir.program import Graph, Program
from qpcompile.stages import Stage


@dataclass(frozen=True)
class MergeDuplicates:
    """See the module's docstring."""

    name: ClassVar[str] = "merge_duplicates"
    purpose: ClassVar[str] = (
        "Common-subexpression elimination: a call with the same operator and arguments as an earlier one is "
        "replaced by it."
    )
    needs: ClassVar[Stage] = "fused"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was merged."""
        changed = [_merge(graph) for graph in program.graphs.values()]
        return any(changed)


def _merge(graph: Graph) -> bool:
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
    return tidy(graph) or merged


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
