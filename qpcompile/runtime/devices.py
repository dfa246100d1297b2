"""Move a program to another device: every tensor once, and the devices of tensor-creating operators.

%p = aten::arange(%s)                becomes      %p = aten::arange(%s, device=cuda:0)
"""

# pyright: reportPrivateUsage=false
# torch has no public name for a module's own tables of tensors, and a storage's address.

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qpcompile.ir.edit import get_tensor
from qpcompile.ir.numerics import check_numerics
from qpcompile.ir.overloads import is_overload, schema
from qpcompile.ir.program import Graph, Program

Moved = dict[tuple[Any, ...], torch.Tensor]


def move(program: Program, device: torch.device) -> None:
    """Put all tensors of graphs and host on `device`; tensors that share memory share it there too.

    Raises RecipeError where the program's numerics are exact and the device is no CPU.
    """
    check_numerics(program.recipe, [torch.empty(0, device=device)])
    moved: Moved = {}
    for graph in program.graphs.values():
        _move_tensors(graph.module, device, moved)
        _move_nodes(graph, device)
        graph.module.recompile()
    _move_tensors(program.host, device, moved)


def _move_tensors(root: torch.nn.Module, device: torch.device, moved: Moved) -> None:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = _there(parameter.detach(), device, moved)
                module._parameters[name] = torch.nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _there(buffer, device, moved)


def _there(tensor: torch.Tensor, device: torch.device, moved: Moved) -> torch.Tensor:
    place = (tensor.untyped_storage()._cdata, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
    if place not in moved:
        moved[place] = tensor.to(device)
    return moved[place]


def _move_nodes(graph: Graph, device: torch.device) -> None:
    """Rewrite devices recorded in the trace, and those of operators that create tensors."""
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = get_tensor(graph.module, str(node.target))
        elif node.op == "call_function":
            node.args, node.kwargs = on_device(node, device)


def on_device(node: fx.Node, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that computes on `device`."""
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
    return args, {**kwargs, "device": device} if _makes_tensors(node) else kwargs


def _makes_tensors(node: fx.Node) -> bool:
    """Whether an operator takes a device and no tensor to read it from."""
    if not is_overload(node.target):
        return False
    arguments = schema(node.target).arguments
    types = [str(argument.type) for argument in arguments]
    return any(argument.name == "device" for argument in arguments) and not any("Tensor" in each for each in types)
