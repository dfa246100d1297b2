"""What each cut costs: the model's next-token distribution with one cut, against the full-precision one without.

    C[b][k] = mean over samples of KL( p || p with one cut in front of layer b to the share k )

The cut run is quantized as the recipe says (in floating point, at the quant stubs) and scores tokens with the method's
own scores, so that the price is that of the operators that will run. The distribution is that of the first token of
the answer.

Ours: QUOTA (arXiv 2604.17320, section 3.2) plans by each layer's own relative deviation instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.budget import DENOMINATOR
from qpcompile.ir.collect import run_sample
from qpcompile.ir.cut_costs import CutCosts
from qpcompile.ir.edit import clone
from qpcompile.ir.facts import stub_fact
from qpcompile.ir.fake_quant import StubRounding
from qpcompile.ir.interpret import run_watched
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.ir.pruners.joint import Joint
from qpcompile.ir.pruners.pruner import INPUT
from qpcompile.ir.pruners.table import PRUNERS
from qpcompile.ir.run import COUNT, VALID, VISUAL, Machine, execute_graph
from qpcompile.passes.insert_token_cuts import cut_prefill
from qpcompile.plan import Cut
from qpcompile.progress import track

# A numerator that no graph has by chance: the cut graphs are made once and get each share in its place.
MARK = 999_983


@dataclass(frozen=True)
class MeasureCuts:
    """See the module's docstring. For methods whose schedule is solved from measured costs."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "measure_cuts"
    needs: ClassVar[str] = "calibrated"
    gives: ClassVar[str] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `program.facts["cut_costs"]`; the graphs stay as they are."""
        tokens = program.recipe.tokens
        if tokens.method == "none" or not isinstance(PRUNERS[tokens.method], Joint) or "cut_costs" in program.facts:
            return False
        if tokens.keep_of != "mean":
            raise PlanError(
                "joint solves for a mean over layers; the share behind the last cut is its own to choose",
                where="tokens.keep_of",
                do="write mean",
            )
        table = np.zeros((len(program.layers), len(tokens.cost_levels)))
        trial = _Trial(program, table)
        machine = Machine(program, trial.execute)
        trial.machine = machine
        count = min(self.count, tokens.cost_samples)
        with track("measure_cuts", count) as step:
            for number, sample in enumerate(itertools.islice(self.samples, count)):
                run_sample(machine, sample, number)
                step()
        program.facts["cut_costs"] = CutCosts(tokens.cost_levels, table / count, trial.base / count)
        return False


class _Trial:
    """Runs the prefill graph in full precision, then quantized with every single cut, and adds up what changes."""

    def __init__(self, program: Program, table: np.ndarray) -> None:
        self.program, self.table, self.base = program, table, 0.0
        self.machine: Machine | None = None
        self.graph = program.graphs[PREFILL]
        self.cuts = dict(_cut_graphs(program))
        scheme = program.recipe.quantize
        self.rounding = None if scheme is None else StubRounding(scheme)

    def execute(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a graph; on prefill, measure."""
        results = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            self.measure(feeds, self.next_token(results))
        return results

    def measure(self, feeds: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
        """expected: f32[B, vocabulary], log-probabilities."""
        assert self.machine is not None and self.machine.visual is not None and self.machine.valid is not None
        visual = self.machine.visual
        count = torch.arange(int(visual.sum(dim=1).min()))
        feeds = {**feeds, VISUAL: visual, VALID: self.machine.valid, COUNT: count}
        self.base += self.divergence(self.graph, feeds, expected)
        for (layer, level), graph in self.cuts.items():
            self.table[layer, level] += self.divergence(graph, feeds, expected)

    def divergence(self, graph: Graph, feeds: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
        """KL(expected || what the graph gives once quantized)."""
        results = run_watched(graph, {name: feeds[name] for name in graph.inputs}, self.quantize)
        found = self.next_token(results)
        return float((expected.exp() * (expected - found)).sum(dim=-1).mean())

    def next_token(self, results: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the first new token, f32[B, vocabulary]."""
        last = next(iter(results.values()))[:, -1:]
        if HEAD in self.program.graphs:
            head = self.program.graphs[HEAD]
            last = next(iter(execute_graph(head, {head.inputs[0]: last}).values()))
        return last[:, 0].float().log_softmax(dim=-1)

    def quantize(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        """A stub's value as the operators will see it."""
        fact = stub_fact(node)
        return value if fact is None or self.rounding is None else self.rounding(value, fact)


def _cut_graphs(program: Program) -> Iterator[tuple[tuple[int, int], Graph]]:
    """((layer, index of the share), the prefill graph with that one cut in front of the layer)."""
    recipe = program.recipe
    pruner = PRUNERS[recipe.tokens.method]
    for layer in range(len(program.layers)):
        graph = clone(program.graphs[PREFILL])
        cut = Cut(layer=layer + INPUT, ratio=MARK / DENOMINATOR, numerator=MARK, denominator=DENOMINATOR)
        cut_prefill(graph, (cut,), recipe, pruner)
        for index, share in enumerate(recipe.tokens.cost_levels):
            yield (layer, index), _with_share(graph, round(share * DENOMINATOR))


def _with_share(graph: Graph, numerator: int) -> Graph:
    """The same cut to another share."""
    made = clone(graph)
    for node in made.nodes:
        if MARK in node.args:
            node.args = tuple(numerator if argument == MARK else argument for argument in node.args)
    made.module.recompile()
    return made
