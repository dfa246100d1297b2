"""Graph edits on one part of a program before its ONNX export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from qpcompile.emit.onnx.wrap import Part
from qpcompile.ir.edit import is_call


def calls(part: Part, *targets: object) -> list[fx.Node]:
    """The nodes that call one of `targets`, in order."""
    return [node for node in part.module.graph.nodes if is_call(node, *targets)]


def put(part: Part, before: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call before a node, in the module that `like` was traced in."""
    with part.module.graph.inserting_before(before):
        node = part.module.graph.call_function(target, args, kwargs)
    node.meta.update({key: found for key, found in like.meta.items() if key != "val"})
    return node


def replace(part: Part, node: fx.Node, new: fx.Node) -> None:
    """Replace attention by `new`. torch treats attention as random, so dead-code elimination would not remove it."""
    node.replace_all_uses_with(new)
    part.module.graph.erase_node(node)
