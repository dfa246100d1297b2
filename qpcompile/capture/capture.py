"""Capture a transformers VLM as a Program: one traced graph per component, the rest stays on the host."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from qpcompile.capture.record import find_components, record
from qpcompile.capture.sample import two_rows
from qpcompile.capture.trace import trace
from qpcompile.capture.unread import drop_unread
from qpcompile.capture.visual_path import visual_path
from qpcompile.errors import CaptureError
from qpcompile.ir.edit import layer_of
from qpcompile.ir.program import DECODE, HEAD, PREFILL, PROJECTOR, VISION, Graph, Program
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.recipe.plan import Layer, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.host import empty_host, fill_host, host_tensors
from qpcompile.runtime.machine import visual_tokens

# The component and the index of its call that each graph is traced from.
SOURCES = (
    (VISION, "vision", 0),
    (PROJECTOR, "projector", 0),
    (PREFILL, "language", 0),
    (DECODE, "language", 1),
    (HEAD, "head", 0),
)


def capture(model: PreTrainedModel, sample: dict[str, Any], recipe: Recipe) -> Program:
    """Trace every component of `model`, as called by one small `generate` on `sample`.

    Raises ModelError for a model that is not a VLM and CaptureError, with the component and the line of the model's
    code, if tracing fails or the graph differs from eager.
    """
    find_components(model)  # refuses a model that is not a VLM, before running it
    pad = model.generation_config.pad_token_id
    prompt = two_rows(sample, pad if isinstance(pad, int) else 0)
    recording = record(model, prompt)
    graphs: dict[str, Graph] = {}
    for name, component, occurrence in SOURCES:
        call = recording.first(component, occurrence)
        if call is None:
            continue
        owner = recording.owners[component]
        if name == PREFILL:
            call.inputs[CACHE_ARGUMENT] = DynamicCache()
        if name == HEAD:
            call.inputs = {key: value.expand(-1, 2, -1).contiguous() for key, value in call.inputs.items()}
            call.output = model.get_submodule(owner)(**call.inputs)
        graphs[name] = trace(name, owner, model.get_submodule(owner), call)
    graphs[VISION].constants |= visual_path(recording, prompt["input_ids"], visual_tokens(model.config))
    held = _own_weights(graphs)
    host = fill_host(empty_host(type(model), model.config), host_tensors(model, held), model.dtype)
    host.generation_config = copy.deepcopy(model.generation_config)
    layers = _layers(graphs[PREFILL])
    program = Program(graphs, host, layers, recipe, Plan(recipe=recipe, layers=layers))
    # Running binds a host to its program: run a copy, on the same tensors.
    tensors = [*host.parameters(), *host.buffers()]
    own = copy.deepcopy(host, {id(tensor): tensor for tensor in tensors})
    drop_unread(dataclasses.replace(program, host=own), prompt)
    return program


def _own_weights(graphs: dict[str, Graph]) -> set[str]:
    """Rename each graph's tensors to their names in the model; returns these names."""
    held: set[str] = set()
    for graph in graphs.values():
        prefix = f"{graph.owner}." if graph.owner else ""
        root = graph.module
        for node in root.graph.nodes:
            if node.op == "get_attr":
                held.add(prefix + str(node.target))
    return held


def _layers(prefill: Graph) -> tuple[Layer, ...]:
    """The decoder's layers, found in the module stack of the prefill graph."""
    indices = sorted({index for node in prefill.nodes if (index := layer_of(node)) is not None})
    if not indices:
        raise CaptureError(
            "no decoder layers were found in the prefill graph",
            where=prefill.owner,
            do="report this family: its decoder names its layers in a way that is not known",
        )
    return tuple(Layer(index=index, name=f"{prefill.owner}.layers.{index}") for index in indices)
