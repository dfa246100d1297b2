"""Symbolic shapes of nodes: shape propagation after an edit, new placeholders, comparison of sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qpcompile.ir.edit import fake_mode, infer
from qpcompile.ir.names import Name
from qpcompile.ir.program import Graph


def value(node: fx.Node) -> Any:
    """The fake tensor or symbolic size of a node."""
    return node.meta["val"]


def same(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression (adds no guard)."""
    return expression(left) == expression(right)


def expression(size: int | torch.SymInt) -> Any:
    """The sympy expression of a symbolic size; a concrete size itself."""
    return sym_node(size).expr if isinstance(size, torch.SymInt) else size


def sym_node(size: Any) -> Any:
    """torch's record of a symbolic number: its expression `expr`, and the `shape_env` that knows its symbols."""
    return size.node


def token_axes(node: fx.Node, length: int | torch.SymInt) -> list[int]:
    """The axes of a node's tensor whose size is `length`."""
    tensor = value(node)
    return (
        [axis for axis, size in enumerate(tensor.shape) if same(size, length)]
        if isinstance(tensor, torch.Tensor)
        else []
    )


def new_size(graph: Graph, name: str, hint: int) -> torch.SymInt:
    """A fresh symbolic size with the given hint."""
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    tensor = fake_mode(graph).from_tensor(torch.zeros(hint), source=ConstantSource(name), symbolic_context=context)
    size = tensor.shape[0]
    assert isinstance(size, torch.SymInt)
    return size


def add_input(graph: Graph, path: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
    """A new last input called `path`; returns its placeholder."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.module.graph.inserting_after(last):
        node = graph.module.graph.placeholder(identifier(path))
    with fake_mode(graph):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device=value(last).device)
    graph.inputs = (*graph.inputs, Name(path))
    return node


def identifier(path: str) -> str:
    """A Python identifier for a path: `past_key_values.0.key`, or `kept.-1` of a cut before the decoder."""
    return path.replace(".", "_").replace("-", "minus_")


def add_output(graph: Graph, path: str, node: fx.Node) -> None:
    """A new last output called `path`."""
    output = graph.output_node
    (values,) = output.args
    assert isinstance(values, tuple)
    output.args = ((*values, node),)
    graph.outputs = (*graph.outputs, Name(path))


def propagate(graph: Graph, start: fx.Node | None = None) -> None:
    """Propagate shapes: recompute that of every operator, starting at `start` (default: the first node)."""
    nodes = graph.nodes
    for node in nodes[nodes.index(start) if start is not None else 0 :]:
        if node.op == "call_function":
            infer(graph, node)
