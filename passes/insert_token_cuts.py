"""Drop visual tokens after the planned layers: score, static top-k, gather of everything alive.

    prefill, after layer l                             decode, before the first layer with a shorter cache
      %s = qpcompile::token_scores(%h, %q, %k, ...)      %i = aten::cat(kept.l, the new token's position)
      %i, %a = qpcompile::select_tokens(%s, N, %quota)   %m = aten::gather(%mask, %i)
      %x = aten::gather(%x, %i)   for every live %x

N = S - (V - ceil(V * ratio)): text is always kept, so the count follows from sizes alone and no shape depends on
data. Rows of a batch that may keep fewer tokens than the others carry the surplus as dead slots, which later masks
close; one prompt gives the same answer alone and in a batch. Kept tokens keep their original positions.

Source: "QUOTA" (arXiv 2604.17320), sections 3.3 and 3.4, equations 5 to 9.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.cut_decode import cut_decode
from qpcompile.ir.edit import aten, call, calls, first_node_of_layer, layer_of, tidy
from qpcompile.ir.liveness import Selection, gather, reduce_tokens
from qpcompile.ir.operators import SELECT_TOKENS, TOKEN_SCORES
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.run import ALIVE, COUNT, KEPT, VALID, VISUAL
from qpcompile.ir.shapes import add_input, add_output, new_size, propagate, same, token_axes, value
from qpcompile.plan import Cut
from qpcompile.recipe_schema import TokenScheme

EXAMPLE_VISUAL_TOKENS = 7
RANDOM_PRIME, RANDOM_FACTOR = 1048573, 2654435761


@dataclass(frozen=True)
class InsertTokenCuts:
    """See the module's docstring. The cuts are those of `program.plan`."""

    name: ClassVar[str] = "insert_token_cuts"
    needs: ClassVar[str] = "planned"
    gives: ClassVar[str] = "cut"

    def run(self, program: Program) -> bool:
        """Returns whether anything is cut."""
        cuts = program.plan.cuts
        if not cuts or VISUAL in program.graphs[PREFILL].inputs:
            return False
        tokens = program.recipe.tokens
        rotate = program.recipe.quantize is not None and program.recipe.quantize.transform == "hadamard"
        cut_prefill(program.graphs[PREFILL], cuts, tokens, rotate and tokens.residual_space == "transformed")
        cut_decode(program.graphs[DECODE], [cut.layer for cut in cuts], 0 if tokens.compact_scored_layer else 1)
        return True


def cut_prefill(graph: Graph, cuts: tuple[Cut, ...], tokens: TokenScheme, rotate: bool) -> None:
    """Insert every cut into the prefill graph, first to last."""
    embeddings = value(graph.placeholder("inputs_embeds"))
    batch, length = embeddings.shape[0], embeddings.shape[1]
    visual = add_input(graph, VISUAL, (batch, length), torch.bool)
    valid = add_input(graph, VALID, (batch, length), torch.bool)
    count = add_input(graph, COUNT, (new_size(graph, COUNT, EXAMPLE_VISUAL_TOKENS),), torch.int64)
    state = _State(visual, valid, None, length)
    for cut in cuts:
        point = first_node_of_layer(graph, cut.layer + 1)
        state = _cut_once(graph, point, cut, tokens, rotate, state, (visual, valid, count))
    tidy(graph)


@dataclass(frozen=True)
class _State:
    """What is current between two cuts: visual and valid masks, original positions (None: all), token count."""

    visual: fx.Node
    alive: fx.Node
    kept: fx.Node | None
    length: torch.SymInt


def _cut_once(
    graph: Graph,
    point: fx.Node,
    cut: Cut,
    tokens: TokenScheme,
    rotate: bool,
    state: _State,
    inputs: tuple[fx.Node, ...],
) -> _State:
    visual, valid, count = inputs
    scores = _scores(graph, point, cut.layer, tokens, rotate, state, valid)
    batch = call(graph, point, aten.sym_size.int, visual, 0)
    total = call(graph, point, aten.sym_size.int, visual, 1)
    smallest = call(graph, point, aten.sym_size.int, count, 0)
    dropped = call(graph, point, operator.sub, smallest, _share(graph, point, smallest, cut))
    stays = call(graph, point, operator.sub, total, dropped)
    quota = _quota(graph, point, cut, visual, valid)
    pair = call(graph, point, SELECT_TOKENS, scores, stays, quota)
    index, alive = call(graph, point, operator.getitem, pair, 0), call(graph, point, operator.getitem, pair, 1)
    selection = Selection(index, alive, stays, batch)
    kept = index if state.kept is None else call(graph, point, aten.gather.default, state.kept, 1, index)
    reduced_visual = call(graph, point, aten.gather.default, state.visual, 1, index)
    ours = [node for node in (state.visual, state.alive, state.kept, visual, valid) if node is not None]
    reduce_tokens(graph, point, [(state.length, selection)], skip=ours)
    if tokens.compact_scored_layer:
        _compact_cache(graph, point, cut.layer, state.length, selection)
    add_output(graph, f"{KEPT}.{cut.layer}", kept)
    add_output(graph, f"{ALIVE}.{cut.layer}", alive)
    propagate(graph, point)
    return _State(reduced_visual, alive, kept, value(stays))


def _share(graph: Graph, point: fx.Node, size: fx.Node, cut: Cut) -> fx.Node:
    """ceil(size * numerator / denominator) on a symbolic size."""
    scaled = call(graph, point, operator.mul, size, cut.numerator)
    raised = call(graph, point, operator.add, scaled, cut.denominator - 1)
    return call(graph, point, operator.floordiv, raised, cut.denominator)


def _quota(graph: Graph, point: fx.Node, cut: Cut, visual: fx.Node, valid: fx.Node) -> fx.Node:
    """Tokens each row may keep: its text and its share of its own visual tokens, i64[B]."""
    text = call(graph, point, aten.bitwise_and.Tensor, valid, call(graph, point, aten.bitwise_not.default, visual))
    texts = call(graph, point, aten.sum.dim_IntList, text, [1])
    own = call(graph, point, aten.sum.dim_IntList, visual, [1])
    raised = call(
        graph, point, aten.add.Tensor, call(graph, point, aten.mul.Tensor, own, cut.numerator), cut.denominator - 1
    )
    share = call(graph, point, aten.div.Tensor_mode, raised, cut.denominator, rounding_mode="floor")
    return call(graph, point, aten.add.Tensor, texts, share)


def _scores(
    graph: Graph, point: fx.Node, layer: int, tokens: TokenScheme, rotate: bool, state: _State, valid: fx.Node
) -> fx.Node:
    if tokens.method == "random":
        return _random_scores(graph, point, tokens.seed, state, valid)
    attention = read_attention(_attention(graph, layer))
    weights = tokens.weights
    return call(
        graph,
        point,
        TOKEN_SCORES,
        _hidden(graph, point, state.length),
        attention.query,
        attention.key,
        attention.mask,
        attention.scale,
        state.visual,
        state.alive,
        [weights.inter, weights.magnitude, weights.intra, weights.residual],
        tokens.normalize,
        tokens.percentiles[0],
        tokens.percentiles[1],
        tokens.queries,
        tokens.intra_mean,
        rotate,
    )


def _random_scores(graph: Graph, point: fx.Node, seed: int, state: _State, valid: fx.Node) -> fx.Node:
    """A hash of position and seed on visual tokens, +inf on text, -inf on padding: the same on every back end.

    Positions are counted from the first token of each row, so that padding does not change the draw.
    """
    position = call(graph, point, aten.cumsum.default, valid, 1)
    if state.kept is not None:
        position = call(graph, point, aten.gather.default, position, 1, state.kept)
    shifted = call(graph, point, aten.add.Tensor, position, seed * 7919 + 1)
    mixed = _modulo(graph, point, shifted, RANDOM_FACTOR)
    # x^5 is one-to-one modulo this prime and, unlike x itself, spreads neighbours unevenly.
    square = _modulo(graph, point, mixed, mixed)
    score = _modulo(graph, point, _modulo(graph, point, square, square), mixed)
    score = call(graph, point, aten.to.dtype, score, torch.float32)
    score = call(graph, point, aten.where.ScalarOther, state.visual, score, float("inf"))
    return call(graph, point, aten.where.ScalarOther, state.alive, score, float("-inf"))


def _modulo(graph: Graph, point: fx.Node, left: fx.Node, right: fx.Node | int) -> fx.Node:
    """left * right modulo the largest prime below 2^20, which float32 holds exactly."""
    return call(graph, point, aten.remainder.Scalar, call(graph, point, aten.mul.Tensor, left, right), RANDOM_PRIME)


def _attention(graph: Graph, layer: int) -> fx.Node:
    found = [node for node in calls(graph, aten.scaled_dot_product_attention.default) if layer_of(node) == layer]
    if len(found) != 1:
        raise PlanError(
            f"layer {layer} has {len(found)} attention nodes over tokens, scoring needs exactly one",
            where=graph.name,
            do="choose other tokens.candidate_layers, or tokens.method random",
        )
    return found[0]


def _hidden(graph: Graph, point: fx.Node, length: torch.SymInt) -> fx.Node:
    """The residual stream at `point`: the last value [B, N, C] defined before it that is read after it."""
    width = value(graph.placeholder("inputs_embeds")).shape[2]
    nodes = graph.nodes
    before = nodes[: nodes.index(point)]
    after = set(nodes[nodes.index(point) :])
    for node in reversed(before):
        shape = getattr(value(node), "shape", ()) if "val" in node.meta else ()
        if len(shape) == 3 and same(shape[1], length) and shape[2] == width and after & set(node.users):
            return node
    raise PlanError(
        "no residual stream crosses this layer", where=f"{graph.name}, {point.name}", do="report this family"
    )


def _compact_cache(graph: Graph, point: fx.Node, layer: int, length: torch.SymInt, selection: Selection) -> None:
    """The scored layer's own keys and values are returned for the kept tokens only."""
    output = graph.output_node
    (values,) = output.args
    assert isinstance(values, tuple)
    results = list(values)
    for position, path in enumerate(graph.outputs):
        if path.startswith(f"past_key_values.{layer}."):
            node = results[position]
            assert isinstance(node, fx.Node)
            results[position] = gather(graph, point, node, token_axes(node, length), selection)
    output.args = (tuple(results),)
