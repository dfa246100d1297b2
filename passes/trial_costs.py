"""Evaluate candidates of the search: cut copies of the prefill graph, and their divergence from recorded answers.

Cutting a graph is slow, so all candidates share one copy, with a cut after every layer that any of them cuts after, and
every score there:

    %a = qpcompile::token_scores(...)      %b = qpcompile::token_scores(...)      %i = select_tokens(%all, ...)

A candidate runs the nodes that its answer needs, with its own scores and ratios; the other cuts keep all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import aten, clone
from qpcompile.ir.node_facts import ScoreFact, numerator_fact, score_fact, set_fact, stub_fact
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.passes.insert_token_cuts import ASKED, cut_prefill
from qpcompile.pruning.budget import DENOMINATOR, ratio_fraction
from qpcompile.pruning.candidates import Trial
from qpcompile.pruning.fit import Weights
from qpcompile.pruning.pruner import INPUT, Point
from qpcompile.pruning.scores import BEFORE, FITTED, INSIDE, scores_at
from qpcompile.quality.answers import Agreement, agreement
from qpcompile.quality.recorded import Answered
from qpcompile.quantization.fake_quant import StubRounding
from qpcompile.recipe.choice import Score
from qpcompile.recipe.plan import Cut
from qpcompile.runtime.machine import COUNT, VALID, VISUAL
from qpcompile.runtime.placement import PlacedInterpreter, Placement, run_placed
from qpcompile.runtime.recorded_answer import hidden_path

ALL_TOKENS = Trial(())
"""No cut."""
TITLE = "search_schedule"
EQUAL, WHOLE = "equal", DENOMINATOR
"""The score of cuts that a candidate does not have, and the numerator that keeps all tokens."""


class TrialCosts:
    """Costs of candidates, one number per sample each; `weights` are those of fitted scores."""

    def __init__(self, program: Program, rounding: StubRounding | None) -> None:
        self.program, self.rounding = program, rounding
        self.on = Placement.of(program)
        self.weights: Weights = {}
        self._graph: Graph | None = None
        self._runs: dict[str, _Run] = {}
        self._costs = _restored(program.checkpoint)

    def add(self, trials: Iterable[Trial], number: int, answered: Answered) -> None:
        """Evaluate candidates on the sample with this number, unless that has been done; ranks share them."""

        def work(trial: Trial) -> float:
            found = self.agreement(trial, [answered])
            return found.divergence / max(found.tokens, 1)

        new = [trial for trial in trials if self.seen(trial) == number]
        for trial, cost in self.program.ranks.spread(new, lambda _: 1.0, work):
            self._costs.setdefault(trial.key, []).append(cost)

    def seen(self, trial: Trial) -> int:
        """On how many samples it was evaluated."""
        return len(self._costs.get(trial.key, ()))

    def mean(self, trial: Trial, first: int | None = None) -> float:
        """Its mean cost on all its samples, or on the first ones."""
        costs = self._costs[trial.key][:first]
        return math.fsum(costs) / len(costs)

    def save(self) -> None:
        """Save the costs to the checkpoint: a search that starts again does not evaluate them again."""
        self.program.checkpoint.save(TITLE, {}, {"costs": self._costs})

    def agreement(self, trial: Trial, samples: Iterable[Answered]) -> Agreement:
        """The agreement of a candidate with the recorded answers."""
        run = self._run(trial)
        return sum((self._agreement(run, answered) for answered in samples), Agreement())

    def run(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a graph with its stubs quantized; tensors at home."""
        return run_placed(_Quantized(graph, self.rounding, self.on), feeds)

    def _agreement(self, run: _Run, answered: Answered) -> Agreement:
        visual = answered.visual
        count = torch.arange(int(visual.sum(dim=1).min()), device=visual.device)
        marks = {VISUAL: visual, VALID: answered.valid, COUNT: count, ASKED: answered.asked}
        rows = run({**answered.feeds, **marks})[:, -answered.full.tokens.shape[1] :]
        if HEAD in self.program.graphs:
            head = self.program.graphs[HEAD]
            rows = next(iter(self.on.run(head, {head.inputs[0]: rows}).values()))
        return agreement(answered.full, rows)

    def prepare(self, layers: Iterable[int]) -> None:
        """Cut the graph after all layers that candidates cut after."""
        graph = clone(self.program.graphs[PREFILL])
        cuts = tuple(Cut(layer=layer, ratio=1.0, numerator=WHOLE, denominator=WHOLE) for layer in sorted(set(layers)))
        cut_prefill(graph, cuts, self.program.recipe, _Every(self.weights), shapes=False, answered=True)
        self._graph = graph

    def _run(self, trial: Trial) -> _Run:
        if trial.key not in self._runs:
            if trial.drops and self._graph is None:
                self.prepare(trial.layers)
            graph = self._graph if trial.drops else None
            self._runs[trial.key] = _Run(graph or self.program.graphs[PREFILL], trial, self.rounding, self.on)
        return self._runs[trial.key]


@dataclass(frozen=True)
class _Every:
    """Every score at each cut; the selection reads the first, which is for cuts that keep everything."""

    weights: Weights

    def scores(self, point: Point) -> fx.Node:
        """f32[B, N]."""
        equal = point.only_visual(point.call(aten.to.dtype, point.visual, torch.float32))
        set_fact(equal, ScoreFact(point.layer, EQUAL))
        for name in BEFORE if point.layer == INPUT else INSIDE:
            weights = self.weights.get((name, point.layer), (1.0, 0.0, 0.0, 0.0) if name in FITTED else ())
            set_fact(scores_at(point, Score(name=name, weights=weights)), ScoreFact(point.layer, name))
        return equal


class _Run:
    """What one candidate runs of a graph: the nodes that its answer needs, with its own scores and ratios."""

    def __init__(self, graph: Graph, trial: Trial, rounding: StubRounding | None, on: Placement) -> None:
        self.graph, self.rounding, self.on = graph, rounding, on
        self.ratios = _ratios(graph, trial)
        self.instead = _rewired(graph.nodes, trial)
        self.paths = dict(zip((node for node in graph.nodes if node.op == "placeholder"), graph.inputs, strict=True))
        self.output = graph.result(hidden_path(graph))
        needed, waiting = set[fx.Node](), [self.output]
        while waiting:
            if (node := waiting.pop()) not in needed:
                needed.add(node)
                waiting += self._sources(node)
        self.nodes = [node for node in graph.nodes if node in needed]
        last = {source: node for node in self.nodes for source in self._sources(node)}
        self.ends: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self.ends.setdefault(node, []).append(source)

    def __call__(self, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        """The hidden states, from tensors by input path; all at home."""
        env: dict[fx.Node, Any] = {}

        def fetch(node: fx.Node) -> Any:
            return env[self.instead.get(node, node)]

        with torch.no_grad():
            for node in self.nodes:
                if node.op == "placeholder":
                    env[node] = self.on.there(feeds[self.paths[node]])
                elif node.op == "get_attr":
                    env[node] = self.on.weight(self.graph.module, str(node.target))
                else:
                    env[node] = self._call(node, fetch)
                for source in self.ends.get(node, ()):
                    del env[source]
            return self.on.back(env[self.output])

    def _call(self, node: fx.Node, fetch: Callable[[fx.Node], Any]) -> Any:
        """One operator."""
        args, kwargs = self.on.arguments(node)
        values, named = fx.map_arg(args, fetch), fx.map_arg(kwargs, fetch)
        if (fact := numerator_fact(node)) is not None:
            values = (values[0], self.ratios[fact.layer])
        value = node.target(*values, **named)  # type: ignore[operator]
        stub = stub_fact(node)
        return value if stub is None or self.rounding is None else self.rounding(value, stub)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [self.instead.get(source, source) for source in node.all_input_nodes]


def _ratios(graph: Graph, trial: Trial) -> dict[int, int]:
    """The numerator of every cut: that of the candidate's last one up to there."""
    own = {layer: ratio_fraction(ratio)[0] for layer, ratio, _ in trial.drops}
    found, latest = dict[int, int](), WHOLE
    for layer in sorted({fact.layer for node in graph.nodes if (fact := score_fact(node)) is not None}):
        found[layer] = latest = own.get(layer, latest)
    return found


def _rewired(nodes: Sequence[fx.Node], trial: Trial) -> dict[fx.Node, fx.Node]:
    """The score that a selection reads -> the candidate's."""
    scores = {(fact.layer, fact.name): node for node in nodes if (fact := score_fact(node)) is not None}
    instead: dict[fx.Node, fx.Node] = {}
    for layer, _, name in trial.drops:
        instead[scores[layer, EQUAL]] = scores[layer, name]
    return instead


class _Quantized(PlacedInterpreter):
    """Runs a graph with every stub quantized."""

    def __init__(self, graph: Graph, rounding: StubRounding | None, on: Placement) -> None:
        super().__init__(graph, on)
        self.rounding = rounding

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value, fact = super().run_node(n), stub_fact(n)
        return value if fact is None or self.rounding is None else self.rounding(value, fact)


@dataclass(frozen=True)
class _Contents:
    """Contents of a checkpoint: the costs of each candidate on the first samples."""

    costs: dict[str, list[float]]


def _restored(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """The costs that an interrupted compile has measured."""
    with checkpoint.found(TITLE) as kept:
        if kept is None:
            return {}
        kept.fits({})
        costs = kept.read(_Contents).costs
        if not all(math.isfinite(cost) and cost >= 0 for row in costs.values() for cost in row):
            raise ValueError("a cost is not a number")
        return costs
