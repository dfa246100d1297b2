"""Make traced graphs functional: operators that write to their first argument become those that return a new tensor.

    %a = aten::sum(%x)                   %a = aten::sum(%x)
    %b = aten::div_(%y, %a)        ->    %b = aten::div(%y, %a)
    %c = aten::mul(%y, 2)                %c = aten::mul(%b, 2)

    %v = aten::slice(%x, 2, 0, 1)        %v = aten::slice(%x, 2, 0, 1)
    %b = aten::fill_(%v, %y)       ->    %b = aten::fill(%v, %y)
    %c = aten::mul(%x, 2)                %d = aten::slice_scatter(%x, %b, 2, 0, 1)
                                         %c = aten::mul(%d, 2)

Memory that is not filled becomes zeros. Operators are rewritten only where no other name of the same memory is read
afterwards: everything else stays as it was traced, and a graph is compared with eager after this.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
# Memory that is not filled, and the same filled with zeros.
_FILLED: dict[object, torch._ops.OpOverload] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
}
# Operators whose result may share the memory of their first argument.
_VIEWS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
        *(aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
        *(aten.narrow.default, aten.flatten.using_ints, aten.unflatten.int, aten.detach.default),
        *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.t.default),
        *(aten.view_as.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout),
        *(aten.diagonal.default, aten.alias.default),
    }
)
# Operators whose result is their first argument itself, unless they change its type or device.
_SAME = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default, aten.detach.default})

# Views of a part of a tensor, and the operators that put a part in its place.
_PARTS: dict[object, torch._ops.OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def make_functional(module: fx.GraphModule) -> None:
    """Rewrite the operators of a graph that write to memory; the caller recompiles it."""
    for node in module.graph.nodes:
        node.target = _FILLED.get(node.target, node.target)
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        written = _root(node.args[0]) if node.args else None
        pure = _pure(node)
        if pure is None or not isinstance(written, fx.Node):
            continue
        views = _views(written)
        if _is_shared(views, node, order):
            continue
        with module.graph.inserting_before(node):
            if pure is aten.copy_.default:
                source = node.args[1]
                assert isinstance(source, fx.Node)
                new = _as(module.graph, source, written)
            else:
                new = module.graph.call_function(pure, (written, *node.args[1:]), node.kwargs)
        node.replace_all_uses_with(new)
        for view, whole in zip(views, [*views[1:], None], strict=True):
            new.meta = dict(node.meta) | {"val": view.meta["val"]}
            order[new] = order[node]
            for reader in list(view.users):
                if order.get(reader, -1) > order[node]:
                    reader.replace_input_with(view, new)
            if whole is None:
                break
            with module.graph.inserting_before(node):
                new = module.graph.call_function(_PARTS[view.target], (whole, new, *view.args[1:]), view.kwargs)
        module.graph.erase_node(node)


def _root(node: object) -> object:
    """The value that a cast to the same type and device, which copies nothing, stands for."""
    while isinstance(node, fx.Node) and node.target in _SAME and not node.kwargs.get("copy"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        held, given = source.meta["val"], node.meta["val"]
        if (held.dtype, held.device) != (given.dtype, given.device):
            return node
        node = source
    return node


def _pure(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that returns what `node` writes; `copy_` itself, which becomes its source; None if there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    if target is aten.copy_.default:
        return target
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _views(written: fx.Node) -> list[fx.Node]:
    """A value and those that it is a part of, up to the whole: `x[0][:, 1]` is a part of `x[0]`, and that of `x`."""
    views = [written]
    while views[-1].target in _PARTS:
        whole = views[-1].args[0]
        assert isinstance(whole, fx.Node)
        views.append(whole)
    return views


def _sources(view: fx.Node) -> list[fx.Node]:
    """The values that a value may be a view of, up to the one whose memory it is."""
    found: list[fx.Node] = []
    while view.op == "call_function" and view.target in _VIEWS:
        source = view.args[0]
        assert isinstance(source, fx.Node)
        found.append(view := source)
    return found


def _is_shared(views: list[fx.Node], node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the memory that `node` writes got another name before, none of `views`, that is read after it."""
    above = _sources(views[-1])
    if above and above[-1].op != "call_function":
        return True  # an input's or a weight's memory, by another name
    if any(order.get(reader, -1) > order[node] for name in above for reader in name.users):
        return True
    names = [*views, *above]
    known = set(names)
    while names:
        for user in names.pop().users:
            is_early = order.get(user, -1) < order[node]
            if is_early and user.op == "call_function" and user.target in _VIEWS and user not in known:
                if any(order.get(reader, -1) > order[node] for reader in user.users):
                    return True
                names.append(user)
    return False


def _as(graph: fx.Graph, source: fx.Node, like: fx.Node) -> fx.Node:
    """`source` with the type and the sizes of `like`."""
    held, given = like.meta["val"], source.meta["val"]
    if held.dtype != given.dtype:
        source = graph.call_function(aten.to.dtype, (source, held.dtype))
        source.meta["val"] = given.to(held.dtype)
    if held.ndim != given.ndim or any(
        str(left) != str(right) for left, right in zip(held.shape, given.shape, strict=True)
    ):
        source = graph.call_function(aten.expand_as.default, (source, like))
        source.meta["val"] = held
    return graph.call_function(aten.clone.default, (source,))
