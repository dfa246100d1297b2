"""Common-subexpression elimination: a call with the same operator and arguments as an earlier one is replaced by it.

    %a = aten::unsqueeze(%i, 1)
    %b = aten::unsqueeze(%i, 1)      becomes      %a = aten::unsqueeze(%i, 1)
    %y = aten::add(%a, %b)                        %y = aten::add(%a, %a)

Token cuts gather several values with the same indices, and a cache of codes appends the new token once for attention
and once for the returned cache. Random operators are kept, and nothing is merged across an operator that writes to a
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpcompile.ir.common_subexpressions import merge_equal_calls
from qpcompile.ir.edit import tidy
from qpcompile.ir.program import Program
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
        changed = [merge_equal_calls(graph) | tidy(graph) for graph in program.graphs.values()]
        return any(changed)
