"""A component whose code reads values gets a graph per set of values (runtime/fixed_values.py), or none.

    vision    grid_thw=[[1, 4, 6]], pixel_values [24, 48]
    vision.1  grid_thw=[[1, 8, 4]], pixel_values [32, 48]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from qpcompile.capture.record import Call
from qpcompile.capture.trace import check_sizes, trace_values
from qpcompile.errors import CaptureError
from qpcompile.ir.program import Graph
from qpcompile.recipe.plan import LeftOut
from qpcompile.runtime.fixed_values import SAID, digest_of, of_call

_LOG = logging.getLogger("qpcompile")
# Graphs of one component: each is traced, checked and rewritten by every pass.
MOST_SETS = 4


def graphs_of_values(
    name: str, owner: str, module: torch.nn.Module, calls: Iterable[Call], why: CaptureError
) -> tuple[dict[str, Graph], LeftOut]:
    """The graphs of a component, by name, for the first sets of values in `calls`, and what the plan says of it.

    Without graphs it stays transformers' code. why: what tracing it for all values failed with.
    """
    graphs: dict[str, Graph] = {}
    seen: set[str] = set()
    try:
        for call in calls:
            if (key := digest_of(of_call(call.inputs))) in seen:
                continue
            seen.add(key)
            own = f"{name}.{len(graphs)}" if graphs else name
            graph = trace_values(own, owner, module, call)
            check_sizes(graph)
            graphs[own] = graph
            if len(graphs) == MOST_SETS:
                break
    except CaptureError as error:
        if not graphs:
            same = error.what == why.what and error.where == why.where
            beside = "" if same else f"; for these values alone: {error.what} ({error.where})"
            reason = f"{why.what} ({why.where}){beside}; it stays transformers' code, in full precision"
            _LOG.warning("%s is not captured: %s", name, reason)
            return {}, LeftOut(graph=name, name=owner or name, reason=reason)
        _LOG.warning("%s has no graph of another set of values: %s (%s)", name, error.what, error.where)
    sets = "; ".join(str(graph.constants[SAID]) for graph in graphs.values())
    reason = (
        f"its code reads values: {why.what} ({why.where}); there is a graph of each of these: {sets}; for others it is "
        "transformers' code, in full precision"
    )
    _LOG.warning("%s has graphs of some values only: %s", name, reason)
    return graphs, LeftOut(graph=name, name=owner or name, reason=reason)
