"""Drop visual tokens after the planned layers: score, select a static top-k, gather every live tensor.

    prefill, after layer l                             decode, before the first layer with a shorter cache
      %s = qpcompile::token_scores(%h, %q, %k, ...)      %i = aten::cat(kept.l, the new token's position)
      %i, %a = qpcompile::select_tokens(%s, N, %quota)   %m = aten::gather(%mask, %i)
      %x = aten::gather(%x, %i)   for every live %x

N = S - (V - ceil(V * ratio)): text is always kept, so the count follows from sizes alone and no shape depends on data.
A row of a batch whose quota is below N carries the surplus as dead slots, which are masked out later; a prompt gets the
same answer alone and in a batch. With `tokens.multiple_of: m` N is rounded up to a multiple of m, S at most, and every
row may keep that many more: how many depends on the batch. Kept tokens keep their original positions, or with
`position_mode: reindex` are renumbered (qpcompile/pruning/positions.py).

Source: "QUOTA" (arXiv 2604.17320), sections 3.3 and 3.4, equations 5 to 9.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import aten, first_node_of_layer, tidy
from qpcompile.ir.liveness import Selection, gather, reduce_tokens
from qpcompile.ir.names import CACHE, STATE
from qpcompile.ir.operators import SELECT_TOKENS
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.shapes import add_input, add_output, new_size, propagate, token_axes, value
from qpcompile.pruning.counts import rows_quota, slots, surplus
from qpcompile.pruning.cut_decode import cut_decode
from qpcompile.pruning.cut_states import cut_states, cut_states_decode
from qpcompile.pruning.positions import find_positions, numbered, renumber
from qpcompile.pruning.pruner import Merger, Placed, Point, Scorer, TowerReader
from qpcompile.pruning.states import find_states
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.plan import Cut
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import ALIVE, COUNT, KEPT, VALID, VISUAL
from qpcompile.stages import Stage

ASKED = "asked_mask"
# Smaller than the token count of any traced prompt: a cut may drop all visual tokens.
EXAMPLE_VISUAL_TOKENS = 3


@dataclass(frozen=True)
class InsertTokenCuts:
    """See the module's docstring. The cuts are those of `program.plan`, the scores those of `tokens.method`."""

    name: ClassVar[str] = "insert_token_cuts"
    purpose: ClassVar[str] = (
        "Drop visual tokens after the planned layers: score, select a static top-k, gather every live tensor."
    )
    needs: ClassVar[Stage] = "planned"
    gives: ClassVar[Stage] = "cut"

    def run(self, program: Program) -> bool:
        """Returns whether anything is cut."""
        cuts, recipe = program.plan.cuts, program.recipe
        if not cuts or VISUAL in program.graphs[PREFILL].inputs:
            return False
        pruner = PRUNERS[recipe.tokens.method]
        if states := find_states(program.graphs[PREFILL]):
            cut_states(program.graphs[PREFILL], states, cuts[0], recipe, pruner)
            cut_states_decode(program.graphs[DECODE])
            return True
        if isinstance(pruner, TowerReader):
            pruner.read_tower(program)
        cut_prefill(program.graphs[PREFILL], cuts, recipe, pruner)
        layers, tokens = [cut.layer for cut in cuts], recipe.tokens
        offset = 0 if tokens.compact_scored_layer else 1
        cut_decode(program.graphs[DECODE], layers, offset, reindex=tokens.position_mode == "reindex")
        return True


def cut_prefill(
    graph: Graph,
    cuts: tuple[Cut, ...],
    recipe: Recipe,
    pruner: Scorer,
    shapes: bool = True,
    answered: bool = False,
) -> None:
    """Insert every cut into the prefill graph, first to last.

    Without `shapes` the recorded shapes after the last cut are not recomputed: enough for a graph that is only run.
    `answered`: the prompt is followed by its answer, which is kept, and which scores do not see; the new input
    ASKED: bool[B, S] says which tokens are the prompt's. Dead nodes then stay, for a caller that chooses among scores.
    """
    embeddings = value(graph.placeholder("inputs_embeds"))
    batch, length = embeddings.shape[0], embeddings.shape[1]
    prompt = _Prompt(
        add_input(graph, VISUAL, (batch, length), torch.bool),
        add_input(graph, VALID, (batch, length), torch.bool),
        add_input(graph, COUNT, (new_size(graph, COUNT, EXAMPLE_VISUAL_TOKENS),), torch.int64),
        add_input(graph, ASKED, (batch, length), torch.bool) if answered else None,
    )
    positions = find_positions(graph) if recipe.tokens.position_mode == "reindex" else None
    now = _Tokens(prompt.visual, prompt.valid, None, length, positions)
    unquantized: dict[fx.Node, fx.Node] = {}
    for cut in cuts:
        following = cut.layer + 1
        before = pruner.place(graph, cut.layer) if isinstance(pruner, Placed) else first_node_of_layer(graph, following)
        tokens = (now.visual, now.alive, now.kept, prompt.valid, now.length, prompt.visual)
        point = Point(graph, before, cut, recipe, *tokens, unquantized)
        if recipe.tokens.multiple_of > 1:
            point = replace(point, surplus=surplus(point, *prompt.sizes(point)))
        scores = pruner.scores(point) if prompt.asked is None else _prompt_scores(point, prompt.asked, pruner)
        if isinstance(pruner, Merger):
            point.replace_hidden(pruner.merge(point, scores))
        now = _cut_once(point, scores, prompt, now.positions)
        if shapes or cut is not cuts[-1]:
            propagate(graph, point.before)
    if not answered:
        tidy(graph)


@dataclass(frozen=True)
class _Prompt:
    """Inputs that describe the tokens: two masks bool[B, S], a vector whose length is the smallest number of visual
    tokens of any row, and the tokens before the answer, bool[B, S], if there is one.
    """

    visual: fx.Node
    valid: fx.Node
    count: fx.Node
    asked: fx.Node | None

    def sizes(self, point: Point) -> tuple[fx.Node, fx.Node]:
        """How many tokens a row has, and how many of them at least are visual."""
        return point.call(aten.sym_size.int, self.visual, 1), point.call(aten.sym_size.int, self.count, 0)


@dataclass(frozen=True)
class _Tokens:
    """The state between two cuts: visual and valid masks, original positions (None: all), token count, and the numbers
    that positions are computed from (None: the original ones).
    """

    visual: fx.Node
    alive: fx.Node
    kept: fx.Node | None
    length: torch.SymInt
    positions: fx.Node | None


def _prompt_scores(point: Point, asked: fx.Node, pruner: Scorer) -> fx.Node:
    """Scores as of the prompt alone: `pruner` sees the answer as padding, and then it is kept like text."""
    now = asked if point.kept is None else point.call(aten.gather.default, asked, 1, point.kept)
    prompt = replace(point, alive=point.call(aten.bitwise_and.Tensor, point.alive, now), valid=asked)
    answer = point.call(aten.bitwise_and.Tensor, point.alive, point.call(aten.bitwise_not.default, now))
    return point.call(aten.masked_fill.Scalar, pruner.scores(prompt), answer, float("inf"))


def _cut_once(point: Point, scores: fx.Node, prompt: _Prompt, positions: fx.Node | None) -> _Tokens:
    graph, before = point.graph, point.before
    batch = point.call(aten.sym_size.int, prompt.visual, 0)
    stays = slots(point, *prompt.sizes(point))
    quota = rows_quota(point, prompt.valid, prompt.visual)
    pair = point.call(SELECT_TOKENS, scores, stays, quota)
    index, alive = point.call(operator.getitem, pair, 0), point.call(operator.getitem, pair, 1)
    if any(path.root == STATE for path in graph.outputs):
        index, alive = _dead_first(point, index, alive)
    selection = Selection(index, alive, stays, batch)
    kept = index if point.kept is None else point.call(aten.gather.default, point.kept, 1, index)
    visual = point.call(aten.gather.default, point.visual, 1, index)
    if positions is not None:
        old, positions = positions, numbered(graph, before, alive)
        renumber(graph, before, old, positions, point.length, stays)
    ours = (point.visual, point.alive, point.kept, prompt.visual, prompt.valid, prompt.asked)
    reduce_tokens(graph, before, [(point.length, selection)], skip=[node for node in ours if node is not None])
    if point.recipe.tokens.compact_scored_layer:
        _compact_cache(point, selection)
    add_output(graph, f"{KEPT}.{point.layer}", kept)
    add_output(graph, f"{ALIVE}.{point.layer}", alive)
    return _Tokens(visual, alive, kept, value(stays), positions)


def _dead_first(point: Point, index: fx.Node, alive: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The kept tokens with dead slots moved to the front of their row, as padding.

    A layer with a state reads its tokens one after the other: a dead slot between two of them would change the second.
    """
    order = point.call(aten.argsort.stable, point.call(aten.to.dtype, alive, torch.int64), stable=True, dim=1)
    return point.call(aten.gather.default, index, 1, order), point.call(aten.gather.default, alive, 1, order)


def _compact_cache(point: Point, selection: Selection) -> None:
    """Return the scored layer's own keys and values, and what else it caches per token, for the kept tokens only."""
    graph, output = point.graph, point.graph.output_node
    (values,) = output.args
    assert isinstance(values, tuple)
    results = list(values)
    for position, path in enumerate(graph.outputs):
        if path.root not in (CACHE, STATE) or path.layer != point.layer:
            continue
        node = results[position]
        assert isinstance(node, fx.Node)
        if token_axes(node, point.length):
            results[position] = gather(graph, point.before, node, token_axes(node, point.length), selection)
    output.args = (tuple(results),)
