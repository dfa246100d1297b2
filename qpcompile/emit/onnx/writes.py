"""Rewrite operators that write to memory, for ONNX, which has values only.

    %v = aten::slice(%x, 2, 1, 9, 3)          %v = aten::slice(%x, 2, 1, 9, 3)
    aten::copy_(%v, %y)                       %w = aten::copy(%v, %y)
                                       ->     %x2 = aten::slice_scatter(%x, %w, 2, 1, 9, 3)
    aten::cos(%x)                             aten::cos(%x2)

What is written to a view is put back into what it is a view of; later readers take the new values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpcompile.errors import ExportError

aten = torch.ops.aten
# A view -> what puts a part back, with the same further arguments.
_BACK: dict[object, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
# Views that change the shape alone: the part is put back by giving it the old shape.
_SHAPES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints),
        *(aten.alias.default, aten.detach.default, aten.contiguous.default),
    }
)


def without_writes(graph: fx.Graph) -> None:
    """Rewrite all writes of a graph, in order. Raises ExportError for one that other names of the memory would see."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace != "aten" or not target._schema.is_mutable or target is aten.detach_.default:
            continue
        pure = getattr(getattr(aten, target._schema.name.removeprefix("aten::")[:-1], None), target._overloadname, None)
        written = node.args[0]
        if pure is None or not isinstance(written, fx.Node):
            raise _refused(node)
        with graph.inserting_before(node):
            new = graph.call_function(pure, (written, *node.args[1:]), node.kwargs)
            order[new] = order[node]
            node.replace_all_uses_with(new)
            while True:
                _hand_over(written, new, node, order)
                if written.op != "call_function" or written.target not in (*_BACK, *_SHAPES):
                    break
                whole: Any = written.args[0]
                if written.target in _SHAPES:
                    new = graph.call_function(aten.view_as.default, (new, whole))
                else:
                    new = graph.call_function(_BACK[written.target], (whole, new, *written.args[1:]), written.kwargs)
                order[new] = order[node]
                written = whole
        graph.erase_node(node)


def _hand_over(written: fx.Node, new: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> None:
    """Readers of `written` after the write take `new`; views of it that are read after the write must not be stale."""
    for reader in list(written.users):
        if reader is not new and order.get(reader, len(order)) > order[write]:
            reader.replace_input_with(written, new)
        elif reader.op == "call_function" and reader.target in (*_BACK, *_SHAPES) and reader is not write:
            later = [each for each in reader.users if order.get(each, -1) > order[write]]
            if later and reader not in _path(write):
                raise _refused(write)


def _path(write: fx.Node) -> list[fx.Node]:
    """The views between what is written and the memory that they are views of."""
    path: list[fx.Node] = []
    node: Any = write.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in (*_BACK, *_SHAPES):
        path.append(node)
        node = node.args[0]
    return path


def _refused(node: fx.Node) -> ExportError:
    return ExportError(
        f"{node.target} writes to memory in a way that ONNX has no form of", where=node.name, do="report this family"
    )
