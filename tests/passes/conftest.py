"""The check that every test of a pass runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qpcompile.ir.edit import get_tensor
from qpcompile.ir.pass_manager import Pass, run_passes
from qpcompile.ir.program import Program
from qpcompile.ir.text import graph_text

Apply = Callable[[Program, Pass], bool]


def texts(program: Program) -> dict[str, str]:
    """The printed graphs by name."""
    return {name: graph_text(graph) for name, graph in program.graphs.items()}


def tensors(program: Program) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors that graphs read, by graph and name."""
    reads = [
        (graph, str(node.target)) for graph in program.graphs.values() for node in graph.nodes if node.op == "get_attr"
    ]
    return {(graph.name, name): get_tensor(graph.module, name).detach().clone() for graph, name in reads}


def same(before: dict[tuple[str, str], torch.Tensor], after: dict[tuple[str, str], torch.Tensor]) -> bool:
    """Whether the same tensors have the same values."""
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def apply() -> Apply:
    """apply(program, pass): run the pass and verify, twice; returns whether it reports a change.

    The report must be true (printed graphs and tensors are compared), and the second run must change nothing.
    """

    def once(program: Program, item: Pass) -> bool:
        text, numbers = texts(program), tensors(program)
        (step,) = run_passes(program, [item])
        assert step.modified == (text != texts(program) or not same(numbers, tensors(program))), "the pass lies"
        return step.modified

    def twice(program: Program, item: Pass) -> bool:
        modified = once(program, item)
        plan = program.plan
        assert not once(program, item), "a second run changes something"
        assert program.plan == plan
        return modified

    return twice
