"""FX graph editing shared by passes: tensors by name, layers of nodes, chains of shape operators."""

# pyright: reportPrivateUsage=false
# torch has no public name for a module's own tables of tensors.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qpcompile.errors import PlanError
from qpcompile.ir.names import LAYER
from qpcompile.ir.program import Graph

aten = torch.ops.aten

# Operators that only move or repeat elements: following them upwards finds the producer of a value.
SHAPE_OPS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.contiguous.default,
        aten.clone.default,
        aten.flatten.using_ints,
        aten.repeat_interleave.self_int,
    }
)


def clone(graph: Graph) -> Graph:
    """A copy of a graph with its own nodes; tensors are shared, since passes replace them and never write to them."""
    made = fx.Graph()
    result = made.graph_copy(graph.module.graph, {})
    output = made.output(result)
    output.meta = copy.copy(graph.output_node.meta)
    module = fx.GraphModule(graph.module, made)
    return Graph(graph.name, module, graph.inputs, graph.outputs, graph.owner, graph.returns, dict(graph.constants))


def get_tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter, buffer or attribute called `name` (dotted) of `module`."""
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    return getattr(owner, leaf)


def set_tensor(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Store `value` under the dotted name `name`, creating intermediate modules."""
    owner = module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner.register_buffer(leaf, value)


def drop_tensor(module: torch.nn.Module, name: str) -> None:
    """Remove the parameter, buffer or attribute at the dotted name `name`."""
    *path, leaf = name.split(".")
    delattr(module.get_submodule(".".join(path)), leaf)


def add_tensor(graph: Graph, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
    """A `get_attr` node for the new or replaced tensor `name`, placed before `before`."""
    set_tensor(graph.module, name, value)
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.get_attr(name)
    node.meta["val"] = stand_in(graph, value)
    return node


def call(graph: Graph, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Insert a call before `before` and infer its shape; its module stack is that of `like` (default: `before`)."""
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.call_function(target, args, kwargs)
    source = like or before
    if "nn_module_stack" in source.meta:
        node.meta["nn_module_stack"] = source.meta["nn_module_stack"]
    infer(graph, node)
    return node


def count_up(graph: Graph, before: fx.Node, size: fx.Node, device: torch.device) -> fx.Node:
    """i64[size]: 0, 1, 2, ... on a device. A graph creates tensors on the CPU unless a device is given."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device": device}
    return call(graph, before, aten.arange.default, size, **place)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode the graph was traced in; its shape environment holds the graph's symbols."""
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError(f"no node of the {graph.name} graph has a fake value")


def stand_in(graph: Graph, tensor: torch.Tensor) -> FakeTensor:
    """A tensor's fake tensor (shape, type and device), which keeps no memory alive once a pass replaces the tensor."""
    return fake_mode(graph).from_tensor(tensor.detach(), static_shapes=True)


def infer(graph: Graph, node: fx.Node) -> None:
    """Infer the fake value of one call from those of its arguments."""
    mode = fake_mode(graph)
    target: Any = node.target

    def fake(argument: fx.Node) -> Any:
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return mode.from_tensor(value.detach(), static_shapes=True)
        return value

    # torch 2.11 supports matrix products of symbolic sizes in Python only.
    try:
        with mode, enable_python_dispatcher():
            node.meta["val"] = target(*map_nodes(node.args, fake), **map_nodes(node.kwargs, fake))
    except Exception as error:
        error.add_note(f"at {node.name} of the {graph.name} graph, a call of {target}")
        raise


def map_nodes(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    """The arguments of a call with every node replaced by `function` of it."""
    return fx.map_arg(arguments, function)


def layer_of(node: fx.Node) -> int | None:
    """The index of the layer a node was traced in, or None outside all layers; parts of a layer may be numbered too."""
    for name, _ in node.meta.get("nn_module_stack", {}).values():
        if match := LAYER.search(name):
            return int(match.group(1))
    return None


def first_node_of_layer(graph: Graph, layer: int) -> fx.Node:
    """The first operator of a decoder layer. Raises PlanError where there is no such layer."""
    for node in graph.nodes:
        if node.op == "call_function" and layer_of(node) == layer:
            return node
    raise PlanError(
        f"tokens cannot be cut after layer {layer - 1}: there is no layer after it",
        where=graph.name,
        do="choose tokens.candidate_layers before the last layer",
    )


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands(node: fx.Node) -> dict[str, Any]:
    """The operands of a call of a torch operator by name, defaults filled in; torch calls `self` `input` here."""
    found = node.normalized_arguments(node.graph.owning_module, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert found is not None, node
    return found.kwargs


def calls(graph: Graph, *targets: object) -> Iterator[fx.Node]:
    """The nodes of a graph that call one of `targets`, in order."""
    return (node for node in graph.nodes if is_call(node, *targets))


def through_shape_ops(node: fx.Node, extra: Sequence[object] = ()) -> fx.Node:
    """Follow the first argument of shape operators (and of `extra`) up to the value that was reshaped."""
    while node.op == "call_function" and (node.target in SHAPE_OPS or node.target in extra):
        source = node.args[0]
        if isinstance(source, (list, tuple)):
            source = source[-1]
        assert isinstance(source, fx.Node)
        node = source
    return node


def before_cast(node: fx.Node) -> fx.Node:
    """The input of a cast; any other node itself."""
    if is_call(node, aten.to.dtype):
        assert isinstance(node.args[0], fx.Node)
        return node.args[0]
    return node


def _stays(node: fx.Node) -> bool:
    """Whether a node has side effects. Attention could draw random numbers, but never does here."""
    return node.is_impure() and node.target is not aten.scaled_dot_product_attention.default


def tidy(graph: Graph) -> bool:
    """Dead-code elimination: remove dead nodes and unused tensors, and recompile; returns whether a node was dead."""
    dead = graph.module.graph.eliminate_dead_code(_stays)
    graph.module.graph.lint()
    graph.module.delete_all_unused_submodules()
    used = {node.target for node in graph.module.graph.nodes if node.op == "get_attr"}
    for name, _ in [
        *graph.module.named_parameters(remove_duplicate=False),
        *graph.module.named_buffers(remove_duplicate=False),
    ]:
        if name not in used:
            drop_tensor(graph.module, name)
    graph.module.recompile()
    return dead
