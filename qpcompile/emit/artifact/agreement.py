"""Cross-file consistency checks of an artifact: facts stored in two files must be equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from qpcompile.emit.artifact.folder import AGAIN
from qpcompile.emit.artifact.manifest import Manifest
from qpcompile.emit.artifact.names import GRAPHS
from qpcompile.errors import ArtifactError
from qpcompile.ir.names import CACHE, CROSS_ALIVE, CROSS_KEPT, STATE
from qpcompile.ir.program import DECODE, PREFILL, PROJECTOR, VISION, Graph, Program, component_of
from qpcompile.ir.type_check import MOST_MADE
from qpcompile.ir.types import TYPE, UNKNOWN, ValueType, value_types
from qpcompile.runtime.fixed_values import VALUES
from qpcompile.runtime.machine import ALIVE, KEPT
from qpcompile.runtime.prepare import ABSENT

EMBEDS = "inputs_embeds"
# What is cached of the states that were kept.
CROSS_DTYPES = {CROSS_KEPT: torch.int64, CROSS_ALIVE: torch.bool}


def check_counts(config: PreTrainedConfig, layers: int) -> None:
    """Refuse a configuration of another decoder before allocating anything from it."""
    text: Any = config.get_text_config()
    if text.num_hidden_layers != layers:
        raise ArtifactError(
            f"the decoder has {text.num_hidden_layers!r:.40} layers, manifest.json lists {layers}",
            where="config.json",
            do=AGAIN,
        )


def check_agreement(program: Program, manifest: Manifest) -> None:
    """Refuse an inconsistent program. Raises ArtifactError with the first contradiction."""
    for where, what in _contradictions(program, manifest):
        raise ArtifactError(f"the artifact contradicts itself: {what}", where=where, do=AGAIN)


def _contradictions(program: Program, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, what is wrong there)."""
    plan = program.plan
    if list(manifest.layers) != [layer.name for layer in plan.layers]:
        yield "manifest.json, layers", "plan.yaml has other layers"
    if manifest.sites != plan.sites:
        yield "manifest.json, sites", "plan.yaml has other sites"
    if manifest.left_out != plan.left_out:
        yield "manifest.json, left_out", "plan.yaml leaves out other sites"
    if plan.recipe != program.recipe:
        yield "plan.yaml, recipe", "recipe.yaml asks for something else"
    for name in (PREFILL, DECODE):
        if name not in program.graphs:
            yield "manifest.json, graphs", f"there is no {name} graph"
            return
    for name, graph in program.graphs.items():
        yield from ((f"graph/{name}.json", what) for what in _of_graph(name, graph, program))
    yield from _of_cache(program)
    yield from of_states(program)
    embeds = _type(program.graphs[PREFILL], EMBEDS)
    if embeds.is_known and embeds.dtype != getattr(torch, manifest.dtype):
        yield "manifest.json, dtype", f"the decoder takes {embeds}"


def _of_graph(name: str, graph: Graph, program: Program) -> Iterator[str]:
    if graph.name != name:
        yield f"it holds the graph {graph.name}"
    modules = dict(program.host.named_modules())
    if graph.owner not in modules:
        yield f"the model has no module {graph.owner}"
    elif VALUES in graph.constants and component_of(name) not in (VISION, PROJECTOR):
        yield "only towers and projectors are of some values"
    elif VALUES in graph.constants and (lacking := _lacking(modules[graph.owner])):
        yield f"it is of some values only, and {lacking} for others is not stored"
    first = program.graphs.get(component_of(name), graph)
    if (first.owner, VALUES in first.constants) != (graph.owner, VALUES in graph.constants):
        yield f"it is not of the same part of the model as {first.name}"
    if name not in GRAPHS and component_of(name) not in program.graphs:
        yield f"there is no graph {component_of(name)}"
    if name not in GRAPHS and VALUES not in graph.constants:
        yield f"it does not say which values of {component_of(name)} it is of"
    for path in graph.inputs:
        sizes = graph.placeholder(path).meta[TYPE].sizes if f"{ABSENT}.{path}" in graph.constants else ()
        if math.prod(size.fixed or 1 for size in sizes) > MOST_MADE:
            yield f"zeros in place of {path} would fill the memory"
    cuts = {str(cut.layer) for cut in program.plan.cuts}
    for path in (*graph.inputs, *graph.outputs):
        layer = path.rest.partition(".")[0]
        if path.root in (CACHE, STATE) and not (layer.isdecimal() and int(layer) < len(program.layers)):
            yield f"{path} belongs to no layer"
        elif path.root in (KEPT, ALIVE) and layer not in cuts:
            yield f"{path} belongs to no cut of plan.yaml"


def _lacking(module: torch.nn.Module) -> str | None:
    """A weight that a part of the host would need to run, and does not hold."""
    return next((name for name, weight in module.named_parameters() if not weight.numel()), None)


def _of_cache(program: Program) -> Iterator[tuple[str, str]]:
    """The cache that prefill returns must be the one that decode takes and returns."""
    prefill, decode = program.graphs[PREFILL], program.graphs[DECODE]
    left, taken, kept = (
        {name for name in names if name.root in (CACHE, STATE)}
        for names in (prefill.outputs, decode.inputs, decode.outputs)
    )
    if left != taken or left != kept:
        odd = sorted(left ^ taken) or sorted(left ^ kept)
        yield "graph/decode.json", f"prefill and decode disagree on the cache: {odd[0]}"


def of_states(program: Program) -> Iterator[tuple[str, str]]:
    """A cut of the states of cross-attention must be one that prefill and decode have."""
    prefill, decode, cuts = program.graphs[PREFILL], program.graphs[DECODE], program.plan.cuts
    types = value_types(decode)
    cached = [(path, CROSS_DTYPES[path.part]) for path in decode.inputs if path.part in CROSS_DTYPES]
    if any(types[decode.placeholder(path)].dtype != dtype for path, dtype in cached):
        yield "graph/decode.json", "the states that were kept are of another type"
    states = [cut.states for cut in cuts if cut.states is not None]
    if len(cached) != (len(CROSS_DTYPES) if states else 0):
        yield "plan.yaml", "its cut of states is not that of the graphs"
    if states and (len(cuts) != 1 or cuts[0].layer != -1 or states[0] not in prefill.inputs):
        yield "plan.yaml", f"the prefill graph has no cut of {states[0]}"


def _type(graph: Graph, path: str) -> ValueType:
    """The recorded type of an input; `UNKNOWN` if the graph has no input of that name."""
    return graph.placeholder(path).meta[TYPE] if path in graph.inputs else UNKNOWN
