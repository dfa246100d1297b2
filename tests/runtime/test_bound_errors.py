"""Mismatched operands in a bound graph end in a QPCompileError."""

import pytest
import torch
from torch import fx

from qpcompile.errors import KernelError
from qpcompile.ir.names import names
from qpcompile.ir.program import Graph
from qpcompile.runtime.cpu.bind import BoundGraphs


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (0,)])
def test_what_torch_refuses_is_a_kernel_error(sizes: tuple[int, ...]) -> None:
    made = fx.Graph()
    x = made.placeholder("x")
    made.output((made.call_function(torch.ops.aten.mm.default, (x, x)),))
    graph = Graph("head", fx.GraphModule({}, made), names(("x",)), names(("y",)), "")
    bound = BoundGraphs.__new__(BoundGraphs)
    bound.modules = {"head": graph.module}
    with pytest.raises(KernelError, match="RuntimeError: ") as error:
        bound(graph, {"x": torch.ones(sizes)})
    assert error.value.where == "the graph head" and error.value.__cause__ is not None
