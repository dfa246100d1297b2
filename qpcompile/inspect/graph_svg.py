"""Draw one part of a graph as SVG: operators as boxes, values as lines from top to bottom.

svg = layer_svg(program.graphs["prefill"], "layers.3")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from qpcompile.inspect.layer_nodes import Node, layer_nodes
from qpcompile.inspect.layered_layout import Layout, place
from qpcompile.inspect.outline import outlined
from qpcompile.ir.program import Graph
from qpcompile.ir.text import heading

# Operators that return views of their input.
_SHAPE = re.compile(
    r"^(aten::(view|reshape|transpose|permute|unsqueeze|squeeze|expand|slice|contiguous|clone|select|flatten|_unsafe_view)"
    r"(\.\w+)?|item \d+)$"
)
_HEAVY = re.compile(r"^aten::(linear|matmul|bmm|mm|addmm|scaled_dot_product_attention)(\.\w+)?$")
_CHARACTER, _SMALL_CHARACTER, _LINE, _PADDING, _GAP, _ROW_GAP, _MARGIN = 7.3, 6.1, 15.0, 9.0, 22.0, 26.0, 14.0
_LONGEST_TYPE = 34
_LIGHT = """
.qg { font: 12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.qg text { fill: #1b1f24; text-anchor: middle; }
.qg .t, .qg .w { fill: #5c6570; font-size: 10px; }
.qg .w { font-style: italic; }
.qg rect { fill: #ffffff; stroke: #aab3be; }
.qg .s rect { fill: #eef0f3; stroke: #d3d9e0; }
.qg .h rect { fill: #e3ecfb; stroke: #7fa3e0; }
.qg .q rect { fill: #fbe9d7; stroke: #d79a5c; }
.qg .i rect { fill: none; stroke: #8a949f; stroke-dasharray: 3 2; }
.qg path { fill: none; stroke: #8a949f; }
.qg path.a { fill: #8a949f; stroke: none; }
"""
_DARK = """
.qg text { fill: #e6e9ed; }
.qg .t, .qg .w { fill: #9aa4b0; }
.qg rect { fill: #14171b; stroke: #56606c; }
.qg .s rect { fill: #23282f; stroke: #343b45; }
.qg .h rect { fill: #1d2f52; stroke: #4f7ac4; }
.qg .q rect { fill: #45301b; stroke: #b27a40; }
.qg .i rect { fill: none; stroke: #6d7783; }
.qg path { stroke: #6d7783; }
.qg path.a { fill: #6d7783; stroke: none; }
"""
_COLOURS = f"{_LIGHT}@media screen and (prefers-color-scheme: dark) {{{_DARK}}}\n"


def layer_svg(graph: Graph, part: str, *, standalone: bool = True, outline: bool = False) -> str:
    """Draw `part` of a graph.

    standalone: a complete file, otherwise an element for a page. outline: without types and what only moves values
    (`inspect/outline.py`), so that it is about as wide as a page.
    """
    nodes = layer_nodes(graph, part)
    return nodes_svg(
        outlined(nodes) if outline else nodes, part, f"{heading(graph)}, {part}", standalone=standalone, outline=outline
    )


def nodes_svg(nodes: Sequence[Node], part: str, title: str, *, standalone: bool, outline: bool) -> str:
    """Draw nodes in topological order."""
    rows = {node.name: _outlined_lines(node, part) if outline else _lines(node, part) for node in nodes}
    widths = {name: max(_width(kind, line) for kind, line in lines) + 2 * _PADDING for name, lines in rows.items()}
    layout = place({node.name: node.sources for node in nodes}, widths, _GAP)
    tops, height = _tops(layout, {name: _height(lines) for name, lines in rows.items()})
    width = layout.width + 2 * _MARGIN
    boxes = [_box(node, rows[node.name], layout, widths, tops) for node in nodes]
    heights = {name: _height(lines) for name, lines in rows.items()}
    lines = [_route(edge, layout, tops, heights) for edge in layout.routes]
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    frame = f'<svg class="qg"{space} {size} role="img">'
    return "\n".join(
        [frame, f"<title>{escape(title)}</title>", f"<style>{_COLOURS}</style>", *lines, *boxes, "</svg>\n"]
    )


def _outlined_lines(node: Node, part: str) -> list[tuple[str, str]]:
    """The operator without name space and overload, and the modules whose weights it reads."""
    plain = re.sub(r"^\w+::|\.\w+$", "", node.operator)
    if node.outside:
        return [("t", f"{node.name} {plain}")]
    modules = dict.fromkeys(_module(weight, part) for weight in node.weights if f"{part}." in weight)
    return [("", plain), *(("w", module) for module in modules), *([("t", "leaves")] if node.leaves else [])]


def _lines(node: Node, part: str) -> list[tuple[str, str]]:
    """(class, text) of the lines in a box."""
    if node.outside:
        return [("", f"{node.name} {node.operator}"), ("t", _short_type(node.type))]
    leaves = [("t", f"returned as {path}" if path else "read outside") for path in node.leaves]
    if _SHAPE.match(node.operator):
        return [("t", f"{node.operator.removeprefix('aten::')} {_short_type(node.type)}"), *leaves]
    lines = [("", node.operator)]
    modules = dict.fromkeys(_module(weight, part) for weight in node.weights)
    lines += [("w", module) for module in modules]
    lines.append(("t", _short_type(node.type)))
    return [(kind, line) for kind, line in [*lines, *leaves] if line]


def _module(weight: str, part: str) -> str:
    """The module of a weight, within the part: `self_attn.q_proj` for its codes, scales and bias."""
    name = weight.split(f"{part}.", 1)[-1]
    return re.sub(r"\.(weight|bias)(_\w+)?$", "", name)


def _short_type(text: str) -> str:
    """A type with long sizes abbreviated to `..`."""
    text = re.sub(r"\(?[A-Z]\d*[^,\[\]]*[()][^,\[\]]*", "..", text) if len(text) > _LONGEST_TYPE else text
    return text if len(text) <= 2 * _LONGEST_TYPE else f"{text[: 2 * _LONGEST_TYPE - 2]}.."


def _width(kind: str, line: str) -> float:
    return len(line) * (_SMALL_CHARACTER if kind else _CHARACTER)


def _height(lines: Sequence[tuple[str, str]]) -> float:
    return len(lines) * _LINE + (5.0 if lines[0][0] else 8.0)


def _tops(layout: Layout, heights: dict[str, float]) -> tuple[list[float], float]:
    """Upper edge of each row, and the height of the drawing."""
    tallest = [0.0] * layout.rows
    for name, (_, row) in layout.places.items():
        tallest[row] = max(tallest[row], heights[name])
    tops, y = [], _MARGIN
    for height in tallest:
        tops.append(y)
        y += height + _ROW_GAP
    return tops, y - _ROW_GAP + _MARGIN


def _box(
    node: Node, lines: Sequence[tuple[str, str]], layout: Layout, widths: dict[str, float], tops: Sequence[float]
) -> str:
    middle, row = layout.places[node.name]
    x, y = middle + _MARGIN, tops[row]
    width = widths[node.name]
    top = y + (1.5 if lines[0][0] else 3.0)
    words = "".join(
        f'<text class="{kind or "n"}" x="{x:.1f}" y="{top + index * _LINE + 11:.1f}">{escape(line)}</text>'
        for index, (kind, line) in enumerate(lines)
    )
    box = f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_height(lines):.1f}" rx="4"/>'
    return f'<g class="{_class(node)}"><title>{escape(f"{node.name} : {node.type}")}</title>{box}{words}</g>'


def _class(node: Node) -> str:
    if node.outside:
        return "i"
    if node.operator.startswith("qpcompile::"):
        return "q"
    return "h" if _HEAVY.match(node.operator) else "s" if _SHAPE.match(node.operator) else "o"


def _route(edge: tuple[str, str], layout: Layout, tops: Sequence[float], heights: dict[str, float]) -> str:
    """A smooth line from the lower edge of the source, past the rows between, to the upper edge of the target."""
    source, _ = edge
    first = layout.places[source][1]
    points = list(_points(layout.routes[edge], first, tops, heights[source]))
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = (y1 - y0) / 2
        path += (
            f"L{x1:.1f} {y1:.1f}"
            if x0 == x1
            else f"C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
        )
    x, y = points[-1]
    return f'<path d="{path}"/><path class="a" d="M{x:.1f} {y:.1f}l-3 -6h6z"/>'


def _points(xs: Sequence[float], first: int, tops: Sequence[float], height: float) -> Iterator[tuple[float, float]]:
    yield xs[0] + _MARGIN, tops[first] + height
    for row, x in enumerate(xs[1:], first + 1):
        yield x + _MARGIN, tops[row]
        if row < first + len(xs) - 1:
            yield x + _MARGIN, tops[row + 1] - _ROW_GAP
