"""The interface of pruning methods: where visual tokens are dropped, how many are kept, and how they are scored.

    class Method:
        operators                                    the custom operators of its graphs
        def profiles(self, recipe) -> bool           whether layers are measured for it
        def schedule(self, program) -> Schedule      the layers to cut after, and their keep ratios
        def scores(self, point) -> fx.Node           f32[B, N] at one of them: the highest are kept

A method is the file of its name in methods/, which holds it as METHOD. The cut itself (top-k, gather of everything
alive, caches) is the same for every method: passes/insert_token_cuts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import ValidationError
from torch import fx

from qpcompile.errors import PlanError, RecipeError
from qpcompile.ir.attention import Attention, attends_to_itself, read_attention
from qpcompile.ir.edit import aten, call, calls, layer_of
from qpcompile.ir.node_facts import NumeratorFact, set_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.rematerialize import readers_of, rematerialize
from qpcompile.ir.shapes import same, value
from qpcompile.recipe.choice import Score
from qpcompile.recipe.messages import problems
from qpcompile.recipe.plan import Cut, Sensitivity
from qpcompile.recipe.quantize import Section
from qpcompile.recipe.recipe import Recipe

Operators = tuple[torch._ops.OpOverload, ...]

INPUT = -1
"""The pseudo-layer before the decoder: a cut after it drops tokens before layer 0."""


@dataclass(frozen=True)
class Schedule:
    """Layers to cut after, ascending (INPUT for the decoder's input), and the keep ratio after each.

    `ratios` maps the final keep ratio to one ratio per layer: non-increasing from layer to layer, increasing in its
    argument. `sensitivity`: the measurements the ratios are based on, for the plan. `scores`: how tokens are scored
    after each layer, if the method chooses that by measurement. `waived`: the conditions of the method's own choice of
    layers that no layer met, in words.
    """

    layers: tuple[int, ...]
    ratios: Callable[[float], tuple[float, ...]]
    sensitivity: tuple[Sensitivity, ...] = ()
    scores: tuple[Score, ...] = ()
    waived: tuple[str, ...] = ()

    def mean(self, keep: float, depth: int) -> float:
        """Mean over `depth` decoder layers of the share of visual tokens that each layer processes."""
        starts = [layer + 1 for layer in self.layers]
        spans = [after - start for start, after in zip(starts, [*starts[1:], depth], strict=True)]
        return (starts[0] + sum(span * ratio for span, ratio in zip(spans, self.ratios(keep), strict=True))) / depth


@dataclass(frozen=True)
class Encoded:
    """What a method may read at a cut of the states of cross-attention, `rows: f[B, V, C]`.

    linear: what computes the keys of the first layer that reads them. attention: that layer's, over all states; None if
    it has another form. queries: the prompt's tokens that pictures are shown to, bool[B, S]; None: all.
    """

    rows: fx.Node
    linear: fx.Node
    attention: Attention | None
    queries: fx.Node | None


@dataclass(frozen=True)
class Point:
    """A cut point in the prefill graph, and the values a method may read there.

    New nodes go before `before`. `layer` is the last layer that sees all N current tokens. `visual` and `alive` are
    bool[B, N] nodes, `kept` the original positions i64[B, N] (None: none was dropped yet), `valid` the bool[B, S] of
    the whole prompt, `prompt_visual` its visual tokens. `full_precision` caches values computed without quantization,
    for later cuts. `surplus`: how many tokens more than their share are kept, an int node (None: none). `encoded`: at a
    cut of states of cross-attention, which then are the tokens, and all of them are current.
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
    prompt_visual: fx.Node
    full_precision: dict[fx.Node, fx.Node] = field(default_factory=dict)
    surplus: fx.Node | None = None
    encoded: Encoded | None = None

    @property
    def layer(self) -> int:
        """The last layer that sees all current tokens."""
        return self.cut.layer

    @property
    def rotate(self) -> bool:
        """Whether the inputs of linears are rotated before quantization."""
        return self.recipe.quantize is not None and self.recipe.quantize.transform == "hadamard"

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node at this place."""
        return call(self.graph, self.before, target, *args, **kwargs)

    def hidden(self) -> fx.Node:
        """The residual stream f[B, N, C] of a token; several streams of a token, f[B, N, n, C / n], side by side."""
        if self.encoded is not None:
            return self.encoded.rows
        node = self._residual()
        return node if value(node).ndim == 3 else self.call(aten.flatten.using_ints, node, 2)

    def _residual(self) -> fx.Node:
        """The last value of the embeddings' width that is defined before this place and read after it."""
        width = value(self.graph.placeholder("inputs_embeds")).shape[2]
        nodes = self.graph.nodes
        border = nodes.index(self.before)
        after = set(nodes[border:])
        for axes in (3, 4):
            for node in reversed(nodes[:border]):
                shape: tuple[Any, ...] = getattr(value(node), "shape", ()) if "val" in node.meta else ()
                is_hidden = len(shape) == axes and same(shape[1], self.length) and shape[-1] == width
                if is_hidden and after & set(node.users):
                    return node
        raise PlanError(
            "no residual stream crosses this layer",
            where=f"{self.graph.name}, {self.before.name}",
            do="report this family",
        )

    def replace_hidden(self, hidden: fx.Node) -> None:
        """Replace the residual stream by `hidden: f[B, N, C]` for all readers after this place."""
        old, nodes = self._residual(), self.graph.nodes
        later = set(nodes[nodes.index(self.before) :])
        new = hidden if value(old).ndim == 3 else self.call(aten.view_as.default, hidden, old)
        for user in list(old.users):
            if user in later:
                user.replace_input_with(old, new)

    def times_numerator(self, multiply: Any, size: fx.Node) -> fx.Node:
        """`size` times the numerator of the keep ratio, marked so that a search can try other ratios on the graph."""
        scaled = self.call(multiply, size, self.cut.numerator)
        set_fact(scaled, NumeratorFact(self.cut.layer))
        return scaled

    def share(self, visual: fx.Node) -> fx.Node:
        """ceil(V * ratio), i64[B]: how many of a row's V tokens marked in `visual: bool[B, S]` are kept.

        With a surplus that many more, but at most the current ones.
        """
        own = self.call(aten.sum.dim_IntList, visual, [1])
        scaled = self.times_numerator(aten.mul.Tensor, own)
        raised = self.call(aten.add.Tensor, scaled, self.cut.denominator - 1)
        share = self.call(aten.div.Tensor_mode, raised, self.cut.denominator, rounding_mode="floor")
        if self.surplus is None:
            return share
        there = self.call(aten.sum.dim_IntList, self.call(aten.bitwise_and.Tensor, self.visual, self.alive), [1])
        return self.call(aten.minimum.default, self.call(aten.add.Tensor, share, self.surplus), there)

    def attention(self, layer: int | None = None) -> Attention:
        """The attention operands of a layer (default: the last layer before this place).

        Queries and keys of the layer after this place are computed here, for all current tokens.
        """
        read = read_attention(attention_node(self.graph, self.layer if layer is None else layer))
        return replace(read, query=self.early(read.query), key=self.early(read.key))

    def early(self, node: fx.Node) -> fx.Node:
        """Recompute at this place a value that the graph computes later: for all current tokens, on copied nodes."""
        nodes = self.graph.nodes
        later = set(nodes[nodes.index(self.before) :])
        return rematerialize(self.graph, node, self.before, {}, lambda each: each in later)

    def unquantized(self, node: fx.Node) -> fx.Node:
        """A value without any quantization in the decoder: its transitive inputs are computed twice."""
        stubs = list(calls(self.graph, QUANT_STUB))
        touched = readers_of(self.graph, stubs)
        known = self.full_precision
        return rematerialize(self.graph, node, self.before, known, touched.__contains__, bypass=(QUANT_STUB,))

    def only_visual(self, scores: fx.Node) -> fx.Node:
        """`scores` of visual tokens, +inf for text, which is never dropped, -inf for padding."""
        text = self.call(aten.where.ScalarOther, self.visual, scores, float("inf"))
        return self.call(aten.where.ScalarOther, self.alive, text, float("-inf"))


class Scorer(Protocol):
    """What inserting cuts reads of a method."""

    def scores(self, point: Point) -> fx.Node:
        """f32[B, N]: the tokens with the highest scores are kept; text +inf, padding -inf."""
        ...


class Pruner(Scorer, Protocol):
    """One method."""

    operators: ClassVar[Operators]
    """The custom operators that it adds to graphs; `qpcompile doctor` tests them."""

    def profiles(self, recipe: Recipe) -> bool:
        """Whether the schedule needs layer measurements on samples (passes/measure_sensitivity.py)."""
        ...

    def schedule(self, program: Program) -> Schedule:
        """Where this method cuts; raises PlanError for layers that the model does not have."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A method that does not cut right before the first operator of the next layer."""

    def place(self, graph: Graph, layer: int) -> fx.Node:
        """The node of the prefill graph before which the cut after `layer` is inserted."""
        ...


@runtime_checkable
class TowerReader(Protocol):
    """A method that also reads the vision tower."""

    def read_tower(self, program: Program) -> None:
        """Add the outputs that the method reads to the vision graph (pruning/tower.py), before the first cut."""
        ...


@runtime_checkable
class Merger(Protocol):
    """A method that merges dropped tokens into kept ones."""

    def merge(self, point: Point, scores: fx.Node) -> fx.Node:
        """The new residual stream f[B, N, C], before the drop; `scores` as returned by the method."""
        ...


@runtime_checkable
class StatesCutter(Protocol):
    """A method that can score the states that cross-attention reads (pruning/states.py)."""

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """The parts of its score that do not exist for states, in words. Raises PlanError if none is left.

        text: whether states are of text too. attention: whether a layer's attention over them can be read.
        """
        ...

    def scores(self, point: Point) -> fx.Node:
        """f32[B, V]: the states with the highest scores are kept."""
        ...


@runtime_checkable
class Configurable(Protocol):
    """A method with recipe keys of its own."""

    options: ClassVar[type[Section]]
    """The keys below `tokens.options`."""


@runtime_checkable
class Particular(Protocol):
    """A method that does not work with every setting."""

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError for settings it does not work with, before anything is measured."""
        ...


@runtime_checkable
class RiskFuser(Protocol):
    """A method that fuses the quantization risk into its score if the recipe asks for it (pruning/risk.py)."""

    fuses_risk: ClassVar[Literal[True]]


_Options = TypeVar("_Options", bound=Section)


def options_of(section: type[_Options], recipe: Recipe) -> _Options:
    """The recipe's `tokens.options` as a method declares them. Raises RecipeError for any other key or value."""
    given = dict(recipe.tokens.options)
    try:
        return section.model_validate(given)
    except ValidationError as error:
        known = ", ".join(section.model_fields) or "none"
        raise RecipeError(
            "\n  ".join([f"{recipe.tokens.method} cannot use its options:", *problems(section, error, given)]),
            where="tokens.options",
            do=f"its own keys are {known}; others belong directly below tokens",
        ) from error


def attention_node(graph: Graph, layer: int) -> fx.Node:
    """The one attention over tokens in a layer; PlanError if there is none, or several."""
    found = [node for node in _own_attention(graph) if layer_of(node) == layer]
    if len(found) != 1:
        raise PlanError(
            f"layer {layer} has {len(found)} attention nodes over tokens, scoring needs exactly one",
            where=graph.name,
            do="choose other tokens.candidate_layers, or tokens.method random",
        )
    return found[0]


def attention_layers(graph: Graph) -> set[int]:
    """The layers that can score tokens: those with one attention over them; others keep a state, or read pictures."""
    found = [layer_of(node) for node in _own_attention(graph)]
    return {layer for layer in found if layer is not None and found.count(layer) == 1}


def _own_attention(graph: Graph) -> list[fx.Node]:
    """The attention nodes of a graph over its own tokens: cross-attention scores those of another sequence."""
    return [node for node in calls(graph, aten.scaled_dot_product_attention.default) if attends_to_itself(node)]


def layers_after(parts: Sequence[float], depth: int) -> tuple[int, ...]:
    """Layers to cut after, ascending, at about these fractions of the depth; fewer if they coincide.

    Half a layer is rounded up, and at least one layer runs before the first cut and after the last.
    """
    runs = (max(1, floor(part * depth + 0.5)) for part in parts)
    return tuple(sorted({min(run, depth - 1) - 1 for run in runs}))


def one_layer(program: Program, otherwise: int) -> int:
    """The recipe's only candidate layer, or `otherwise` if it is auto; PlanError for several."""
    layer, *more = cut_layers(program, (min(otherwise, len(program.layers) - 2),))
    if more:
        raise PlanError(
            f"{program.recipe.tokens.method} cuts once, {len(more) + 1} layers are named",
            where="tokens.candidate_layers",
            do="name one layer, or write auto",
        )
    return layer


def cut_layers(program: Program, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The recipe's `candidate_layers`, or `otherwise` if it is auto; checked against the model's depth."""
    asked = program.recipe.tokens.candidate_layers
    layers = otherwise if asked == "auto" else asked
    _check_last(layers[-1], program.layers[-1].index)
    return layers


def check_layers(recipe: Recipe, layers: int | None) -> None:
    """Raise PlanError for `candidate_layers` beyond the decoder's depth, before anything is measured.

    layers: None if unknown; the pruner checks again.
    """
    asked = recipe.tokens.candidate_layers
    if recipe.tokens.method != "none" and asked != "auto" and layers is not None:
        _check_last(asked[-1], layers - 1)


def _check_last(layer: int, last: int) -> None:
    if layer >= last:
        raise PlanError(
            f"tokens cannot be cut after layer {layer}: this model's last layer is {last}",
            where="tokens.candidate_layers",
            do=f"name layers from 0 to {last - 1}",
        )
