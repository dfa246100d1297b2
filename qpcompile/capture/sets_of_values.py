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
from qpcompile.runtime.prepare import EMBEDDINGS, IDS

_LOG = logging.getLogger("qpcompile")
# Graphs of one component: each is traced, checked and rewritten by every pass.
MOST_SETS = 4
# Samples whose values get a graph: each is answered by the model once.
MOST_SAMPLES = 8
# A component that takes the prompt would have a graph per prompt.
OF_PROMPT = {IDS, EMBEDDINGS}


def graphs_of_values(
    name: str, owner: str, module: torch.nn.Module, calls: Iterable[Call], why: CaptureError
) -> tuple[dict[str, Graph], LeftOut]:
    """The graphs of a component, by name, for the first sets of values in `calls`, and what the plan says of it.

    Without graphs it stays transformers' code. why: what tracing it for all values failed with.
    """
    calls = (call for call in calls if not call.inputs.keys() & OF_PROMPT)
    graphs: dict[str, Graph] = {}
    seen: set[str] = set()
    beside = ""
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
        same = error.what == why.what and error.where == why.where
        beside = "" if same else f"; for one set of values alone: {error.what} ({error.where})"
    if not graphs:
        reason = f"{why.what} ({why.where}){beside}; it stays transformers' code, in full precision"
        _LOG.warning("%s is not captured: %s", name, reason)
        return {}, LeftOut(graph=name, name=owner or name, reason=reason)
    sets = "; ".join(str(graph.constants[SAID]) for graph in graphs.values())
    reason = (
        f"its code reads values: {why.what} ({why.where}); there is a graph of each of these: {sets}{beside}; "
        "for others it is transformers' code, in full precision"
    )
    _LOG.warning("%s has graphs of some values only: %s", name, reason)
    return graphs, LeftOut(graph=name, name=owner or name, reason=reason)
