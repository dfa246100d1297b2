"""What a pruning method is: where it drops visual tokens, how many stay there, and how it scores them.

    class Method:
        def schedule(self, program) -> Schedule      the layers to cut behind, and their keep ratios
        def scores(self, point) -> fx.Node           f32[B, N] at one of them: the highest stay

The cut itself (top-k, gather of everything alive, caches) is the same for every method: passes/insert_token_cuts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import Attention, read_attention
from qpcompile.ir.edit import aten, call, calls, layer_of
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import same, value
from qpcompile.plan import Cut, Sensitivity
from qpcompile.recipe import Recipe

INPUT = -1
"""The "layer" in front of the decoder: a cut behind it drops tokens before layer 0."""


@dataclass(frozen=True)
class Schedule:
    """Layers to cut behind, ascending (INPUT for the decoder's input), and the keep ratio behind each.

    `ratios` maps the final keep ratio to one ratio per layer: never increasing from layer to layer, increasing in its
    argument. `sensitivity` is what the ratios rest on, for the plan.
    """

    layers: tuple[int, ...]
    ratios: Callable[[float], tuple[float, ...]]
    sensitivity: tuple[Sensitivity, ...] = ()

    def mean(self, keep: float, depth: int) -> float:
        """Mean over `depth` decoder layers of the share of visual tokens that a layer computes on."""
        starts = [layer + 1 for layer in self.layers]
        spans = [after - start for start, after in zip(starts, [*starts[1:], depth], strict=True)]
        return (starts[0] + sum(span * ratio for span, ratio in zip(spans, self.ratios(keep), strict=True))) / depth


@dataclass(frozen=True)
class Point:
    """A place in the prefill graph where tokens are dropped, and what a method may read there.

    New nodes go before `before`. `layer` is the last layer that sees all N current tokens. `visual` and `alive` are
    bool[B, N] nodes, `kept` the original positions i64[B, N] (None: none was dropped yet), `valid` the bool[B, S] of
    the whole prompt.
    """

    graph: Graph
    before: fx.Node
    cut: Cut
    recipe: Recipe
    visual: fx.Node
    alive: fx.Node
    kept: fx.Node | None
    valid: fx.Node
    length: torch.SymInt

    @property
    def layer(self) -> int:
        """The last layer that sees all current tokens."""
        return self.cut.layer

    @property
    def rotate(self) -> bool:
        """Whether the inputs of linears are rotated before they are quantized."""
        return self.recipe.quantize is not None and self.recipe.quantize.transform == "hadamard"

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node at this place."""
        return call(self.graph, self.before, target, *args, **kwargs)

    def hidden(self) -> fx.Node:
        """The residual stream f[B, N, C]: the last such value defined before this place that is read behind it."""
        width = value(self.graph.placeholder("inputs_embeds")).shape[2]
        nodes = self.graph.nodes
        border = nodes.index(self.before)
        after = set(nodes[border:])
        for node in reversed(nodes[:border]):
            shape = getattr(value(node), "shape", ()) if "val" in node.meta else ()
            if len(shape) == 3 and same(shape[1], self.length) and shape[2] == width and after & set(node.users):
                return node
        raise PlanError(
            "no residual stream crosses this layer",
            where=f"{self.graph.name}, {self.before.name}",
            do="report this family",
        )

    def replace_hidden(self, hidden: fx.Node) -> None:
        """What is read behind this place as the residual stream is `hidden: f[B, N, C]` from now on."""
        old, nodes = self.hidden(), self.graph.nodes
        behind = set(nodes[nodes.index(self.before) :])
        for user in list(old.users):
            if user in behind:
                user.replace_input_with(old, hidden)

    def share(self, visual: fx.Node) -> fx.Node:
        """ceil(V * ratio), i64[B]: how many of the V tokens that `visual: bool[B, S]` marks in a row may stay."""
        own = self.call(aten.sum.dim_IntList, visual, [1])
        scaled = self.call(aten.mul.Tensor, own, self.cut.numerator)
        raised = self.call(aten.add.Tensor, scaled, self.cut.denominator - 1)
        return self.call(aten.div.Tensor_mode, raised, self.cut.denominator, rounding_mode="floor")

    def attention(self) -> Attention:
        """What the attention of the scored layer reads."""
        found = [
            node
            for node in calls(self.graph, aten.scaled_dot_product_attention.default)
            if layer_of(node) == self.layer
        ]
        if len(found) != 1:
            raise PlanError(
                f"layer {self.layer} has {len(found)} attention nodes over tokens, scoring needs exactly one",
                where=self.graph.name,
                do="choose other tokens.candidate_layers, or tokens.method random",
            )
        return read_attention(found[0])

    def only_visual(self, scores: fx.Node) -> fx.Node:
        """`scores` of visual tokens, +inf for text, which is never dropped, -inf for padding."""
        text = self.call(aten.where.ScalarOther, self.visual, scores, float("inf"))
        return self.call(aten.where.ScalarOther, self.alive, text, float("-inf"))


class Pruner(Protocol):
    """One method."""

    def profiles(self, recipe: Recipe) -> bool:
        """Whether the schedule rests on layers measured on samples (passes/measure_sensitivity.py)."""
        ...

    def schedule(self, program: Program) -> Schedule:
        """Where this method cuts; raises PlanError for layers that the model does not have."""
        ...

    def scores(self, point: Point) -> fx.Node:
        """f32[B, N]: what stays has the highest scores; text +inf, padding -inf."""
        ...


@runtime_checkable
class TowerReader(Protocol):
    """A method that also reads the vision tower."""

    def read_tower(self, program: Program) -> None:
        """Make the vision graph say what the method reads (qpcompile/ir/pruners/tower.py), before the first cut."""
        ...


@runtime_checkable
class Merger(Protocol):
    """A method that does not only drop tokens: those that stay take something up."""

    def merge(self, point: Point, scores: fx.Node) -> fx.Node:
        """The residual stream f[B, N, C] to go on with before the drop; `scores` as the method gave them."""
        ...


def cut_layers(program: Program, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The recipe's `candidate_layers`, or `otherwise` where it says auto; checked against the model's depth."""
    asked = program.recipe.tokens.candidate_layers
    layers = otherwise if asked == "auto" else asked
    last = program.layers[-1].index
    if layers[-1] >= last:
        raise PlanError(
            f"layer {layers[-1]} cannot be cut behind: this model's last layer is {last}",
            where="tokens.candidate_layers",
            do=f"name layers from 0 to {last - 1}",
        )
    return layers
