"""Remove additions of zero.

%b = aten::add.Tensor(%a, 0)     readers of %b
  ->                             readers of %a
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpcompile.ir.edit import aten, calls
from qpcompile.ir.program import Program
from qpcompile.stages import Stage


@dataclass(frozen=True)
class DropIdentities:
    """See the module's docstring."""

    name: ClassVar[str] = "drop_identities"
    purpose: ClassVar[str] = "Remove additions of zero."
    needs: ClassVar[Stage] = "canonical"
    gives: ClassVar[Stage] = "canonical"

    def run(self, program: Program) -> bool:
        """Returns whether there were any."""
        found = [(graph, node) for graph in program.graphs.values() for node in calls(graph, aten.add.Tensor)]
        found = [(graph, node) for graph, node in found if node.args[1] == 0]
        for graph, node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.module.graph.erase_node(node)
        return bool(found)
