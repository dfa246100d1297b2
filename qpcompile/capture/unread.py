"""Remove unused outputs of the vision tower, and with them the layers that only they need.

LLaVA uses the second-to-last layer, and discards the last one, the final norm and the pooler. Which outputs the host
reads is determined by experiment: an output filled with NaN that leaves the prompt's embeddings unchanged is not read.
"""

from __future__ import annotations

from typing import Any

import torch

from qpcompile.errors import InputError
from qpcompile.ir.edit import tidy
from qpcompile.ir.program import PREFILL, VISION, Graph, Program
from qpcompile.runtime.fixed_values import VALUES
from qpcompile.runtime.machine import Machine, execute_graph

Results = dict[str, torch.Tensor]


def drop_unread(program: Program, prompt: dict[str, Any]) -> tuple[str, ...]:
    """Remove outputs of the vision graph that do not reach the decoder on `prompt`; returns their paths."""
    if VISION not in program.graphs or VALUES in program.graphs[VISION].constants:
        return ()
    graph = program.graphs[VISION]
    host = _Host(program, prompt)
    with host.machine:
        expected = host.embeddings()
        unread = tuple(path for path in graph.outputs if torch.equal(host.embeddings(poisoned=path), expected))
        if not unread or len(unread) == len(graph.outputs):
            return ()
        before = graph.outputs, graph.returns
        kept = [place for place, path in enumerate(graph.outputs) if path not in unread]
        graph.outputs = tuple(graph.outputs[place] for place in kept)
        graph.returns = _without(graph.returns, unread)
        try:
            same = torch.equal(host.embeddings(), expected)
        except InputError:
            # A host may read an output's metadata without its values, for example its size.
            same = False
        if not same:
            graph.outputs, graph.returns = before
            return ()
    (results,) = graph.output_node.args
    assert isinstance(results, tuple)
    graph.output_node.args = (tuple(results[place] for place in kept),)
    tidy(graph)
    return unread


class _Reached(Exception):
    """Raised when the decoder is called; nothing after it matters here."""


class _Host:
    """The model's own code between tower and decoder, on one prompt; the tower runs once per call of it."""

    def __init__(self, program: Program, prompt: dict[str, Any]) -> None:
        self.prompt = prompt
        self.machine = Machine(program, self._execute)
        self.made: list[Results] = []
        self.calls, self.poisoned = 0, ""
        self.found = torch.empty(0)

    def embeddings(self, poisoned: str = "") -> torch.Tensor:
        """The decoder's input, f[B, S, C]."""
        self.calls, self.poisoned = 0, poisoned
        try:
            self.machine.prefill(self.prompt)
        except _Reached:
            return self.found
        raise AssertionError("a prefill calls the decoder")

    def _execute(self, graph: Graph, feeds: Results) -> Results:
        if graph.name == PREFILL:
            self.found = feeds["inputs_embeds"]
            raise _Reached
        if graph.name != VISION:
            return execute_graph(graph, feeds)
        if self.calls == len(self.made):
            self.made.append(execute_graph(graph, feeds))
        results: Results = {path: self.made[self.calls][path] for path in graph.outputs}
        self.calls += 1
        if self.poisoned and results[self.poisoned].is_floating_point():
            results[self.poisoned] = torch.full_like(results[self.poisoned], torch.nan)
        return results


def _without(template: Any, dropped: tuple[str, ...]) -> Any:
    """A template of results (qpcompile/ir/structure.py) with some replaced by None."""
    if isinstance(template, str):
        return None if template in dropped else template
    if isinstance(template, dict):
        return {key: _without(item, dropped) for key, item in template.items()}
    return [_without(item, dropped) for item in template] if isinstance(template, list) else template
