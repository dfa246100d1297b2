"""PyramidDrop: cuts at a quarter, a half and three quarters of the depth, each scored by the layer after it.

    score_i = 1/H sum_h A^h[last, i]        of layer l+1, from the queries and keys of all its current tokens
    r_i     = keep^(i / m)                  after cut i of m: the paper's 50 %, 25 %, 12.5 % for keep = 12.5 %

The cut after layer l is placed inside layer l+1, between the projections and the rotary embedding: its queries and keys
compute the scores, and then only those of the kept tokens enter its attention and its cache.

Source: "PyramidDrop" (arXiv 2410.17247), section 3.2, and its code for which layer scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, is_call, layer_of
from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.rematerialize import needed_for, readers_of
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule, attention_node, cut_layers, layers_after
from qpcompile.pruning.queries import attention_from, last
from qpcompile.pruning.risk import with_risk
from qpcompile.recipe.recipe import Recipe

PARTS = (1 / 4, 2 / 4, 3 / 4)


@dataclass(frozen=True)
class PyramidDrop:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TOKEN_SCORES,)
    fuses_risk: ClassVar[Literal[True]] = True

    def profiles(self, recipe: Recipe) -> bool:
        """The layers are fixed."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """Three cuts, or those of the recipe, with geometrically decreasing ratios."""
        layers = cut_layers(program, layers_after(PARTS, len(program.layers)))
        return Schedule(layers, lambda keep: tuple(keep ** (i / len(layers)) for i in range(1, len(layers) + 1)))

    def place(self, graph: Graph, layer: int) -> fx.Node:
        """After the last projection that the next layer's attention reads; readers of projections move after it."""
        read = read_attention(attention_node(graph, layer + 1))
        made_of = {
            node
            for target in (read.query, read.key, read.value)
            for node in needed_for(graph, target, lambda each: layer_of(each) == layer + 1)
        }
        projections = [node for node in graph.nodes if node in made_of and is_call(node, aten.linear.default)]
        if not projections:
            raise PlanError(
                f"no projection of queries, keys and values is found in layer {layer + 1}",
                where=graph.name,
                do="choose another tokens.method, or report this family",
            )
        border = projections[-1].next
        needed = {each for node in projections for each in needed_for(graph, node, made_of.__contains__)}
        early = graph.nodes[: graph.nodes.index(border)]
        used = readers_of(graph, projections)
        moved = [node for node in early if node in used and node not in needed]
        for node in moved:
            border.prepend(node)
        return moved[0] if moved else border

    def scores(self, point: Point) -> fx.Node:
        """Attention from the last token, in the layer after the cut."""
        return with_risk(point, attention_from(point, last(point), point.attention(point.layer + 1)))


METHOD: Pruner = PyramidDrop()
