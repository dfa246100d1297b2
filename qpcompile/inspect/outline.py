"""A part of a graph without what only moves values: narrow enough to be drawn as wide as a page.

Left out are views, casts, copies, items of tuples, and the arithmetic of indices and masks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from qpcompile.inspect.layer_nodes import Node

_MOVES = re.compile(
    r"^(aten::(view|reshape|transpose|permute|unsqueeze|squeeze|expand|slice|contiguous|clone|select|flatten|to|detach"
    r"|_unsafe_view|_to_copy|lift_fresh_copy)(\.\w+)?|item \d+)$"
)
_INDEX = re.compile(r"^(bool|i32|i64)\[")


def outlined(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that compute; each reads the nearest ones above it. Nodes are in order of definition, as given."""
    # Name -> the names of shown nodes that it stands for.
    stands: dict[str, tuple[str, ...]] = {}
    shown: dict[str, Node] = {}
    for node in nodes:
        sources = tuple(dict.fromkeys(name for source in node.sources for name in stands[source]))
        if node.outside:
            kept = not _INDEX.match(node.type)
            stands[node.name] = (node.name,) if kept else ()
        elif _MOVES.match(node.operator):
            kept, stands[node.name] = False, sources
            for source in sources:
                seen = shown[source]
                shown[source] = replace(seen, leaves=tuple(dict.fromkeys((*seen.leaves, *node.leaves))))
        else:
            kept = bool(node.type) and not (_INDEX.match(node.type) and node.operator.startswith("aten::"))
            stands[node.name] = (node.name,) if kept else ()
        if kept:
            shown[node.name] = replace(node, sources=sources)
    read = {source for node in shown.values() for source in node.sources}
    return [node for node in shown.values() if node.name in read or (node.sources and not node.outside)]
