"""Run a graph node by node with a callback that observes or replaces node values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qpcompile.ir.program import Graph
from qpcompile.runtime.placement import PlacedInterpreter, Placement, run_placed

# Called with a node, its arguments and its value; returns the value to continue with.
Look = Callable[[fx.Node, tuple[Any, ...], Any], Any]


class Watcher(PlacedInterpreter):
    """An interpreter that calls `look` after every operator."""

    def __init__(self, graph: Graph, look: Look, on: Placement) -> None:
        super().__init__(graph, on)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then call `look`."""
        value = super().run_node(n)
        if n.op != "call_function":
            return value
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.look(n, args, value)


def run_watched(graph: Graph, feeds: dict[str, torch.Tensor], look: Look, on: Placement) -> dict[str, torch.Tensor]:
    """Run a graph on tensors at home, named by input path, calling `look` after each operator."""
    return run_placed(Watcher(graph, look, on), feeds)
