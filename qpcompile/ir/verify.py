"""What is legal in a program at each stage; checked after every pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, get_tensor
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import DECODE, PREFILL, VISION, Graph, Program

# Python functions that may appear on symbolic sizes; every other call goes to a torch operator.
SIZE_FUNCTIONS = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.getitem),
        torch.sym_min,
    }
)

# Operators that must be gone from a stage on, and why.
GONE: dict[str, dict[object, str]] = {
    "canonical": {
        aten._assert_tensor_metadata.default: "runtime assertions",
        aten._assert_scalar.default: "runtime assertions",
        aten.detach_.default: "in-place detach",
        aten.lift_fresh_copy.default: "empty caches",
        aten.dropout.default: "dropout",
    },
    "quantized": {QUANT_STUB: "quant stubs"},
}


def verify(program: Program) -> None:
    """Check every graph against the rules of the program's stage.

    Raises InvariantError naming the pass that has just run and the passes before it, with the graph's name.
    """
    for problem in problems(program):
        ran = program.history[-1] if program.history else "capture"
        raise InvariantError(problem, ran=ran, before=program.history[:-1], do="report this as a defect of the pass")


def problems(program: Program) -> Iterator[str]:
    """Every broken rule, as text."""
    for name in (VISION, PREFILL, DECODE):
        if name not in program.graphs:
            yield f"the program has no {name} graph"
    for graph in program.graphs.values():
        yield from (f"{graph.name}: {text}" for text in _graph_problems(graph))
        for stage, gone in GONE.items():
            if program.at_least(stage):
                for node in graph.nodes:
                    if node.op == "call_function" and node.target in gone:
                        yield f"{graph.name}: {node.name} still holds {gone[node.target]} at stage {program.stage}"
    yield from _cache_problems(program)


def _graph_problems(graph: Graph) -> Iterator[str]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (values,) = graph.output_node.args
    if len(placeholders) != len(graph.inputs):
        yield f"{len(placeholders)} placeholders for {len(graph.inputs)} inputs"
    if not isinstance(values, tuple) or len(values) != len(graph.outputs):
        yield f"the output node does not return the {len(graph.outputs)} outputs"
    for node in graph.nodes:
        yield from _node_problems(graph, node)


def _node_problems(graph: Graph, node: fx.Node) -> Iterator[str]:
    if node.op == "get_attr":
        try:
            get_tensor(graph.module, str(node.target))
        except AttributeError:
            yield f"{node.name} reads the tensor {node.target}, which is not there"
    elif node.op == "call_function":
        if not isinstance(node.target, torch._ops.OpOverload) and node.target not in SIZE_FUNCTIONS:
            yield f"{node.name} calls {node.target}, which is no operator"
        if "val" not in node.meta and node.target is not operator.getitem and node.users:
            yield f"{node.name} has no shape"
    elif node.op not in ("placeholder", "output"):
        yield f"{node.name} is a {node.op} node"


def _cache_problems(program: Program) -> Iterator[str]:
    """What prefill leaves in the cache is what decode takes and leaves."""
    prefill, decode = program.graphs.get(PREFILL), program.graphs.get(DECODE)
    if prefill is None or decode is None:
        return
    left, taken, kept = (
        {name for name in names if name.startswith("past_key_values.")}
        for names in (prefill.outputs, decode.inputs, decode.outputs)
    )
    if left != taken or left != kept:
        yield f"prefill and decode disagree on the cache: {sorted(left ^ taken) or sorted(left ^ kept)}"
