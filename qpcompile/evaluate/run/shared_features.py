"""Cache of visual features: the vision tower runs once for all recipes with an identical tower.

Recipes that differ only in their tokens have identical towers and see the same pictures; on small models the tower
dominates the cost of an answer. Only the features of the latest tower are cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from qpcompile.compiled import CompiledVLM
from qpcompile.ir.program import VISION, Graph
from qpcompile.ir.text import graph_text
from qpcompile.runtime.fixed_values import VALUES


class SharedFeatures:
    """See the module's docstring. Memory: the vision graph's outputs for all pictures seen."""

    def __init__(self) -> None:
        self._tower = ""
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def serve(self, compiled: CompiledVLM) -> None:
        """Make this model's vision graph use and fill the cache."""
        graphs, execute = compiled.program.graphs, compiled.machine.execute
        # Of a tower with a graph per set of values, the inputs of a graph do not tell which pictures they are of.
        if VISION not in graphs or VALUES in graphs[VISION].constants:
            return
        tower = graph_digest(graphs[VISION])
        if tower != self._tower:
            self._tower, self._kept = tower, {}

        def remembering(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if graph.name != VISION:
                return execute(graph, feeds)
            key = tensors_digest({name: feeds[name] for name in graph.inputs})
            if key not in self._kept:
                self._kept[key] = execute(graph, feeds)
            return dict(self._kept[key])

        compiled.machine.execute = remembering


def graph_digest(graph: Graph) -> str:
    """Hash of a graph: its text and its tensors."""
    tensors = dict(graph.module.state_dict())
    return hashlib.sha256((graph_text(graph) + tensors_digest(tensors)).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, types, shapes and contents."""
    total = hashlib.sha256()
    for part in _parts(tensors):
        total.update(part)
    return total.hexdigest()


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterable[bytes | memoryview]:
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        yield f"{name} {held.dtype} {list(held.shape)}".encode()
        yield held.flatten().view(torch.uint8).numpy().data
