"""Capture a transformers VLM as a Program: one traced graph per component, the rest stays on the host."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from qpcompile.capture.boundary import component
from qpcompile.capture.decoder_layers import layers_of, name_other_layers
from qpcompile.capture.logits import HALF, logits_apart
from qpcompile.capture.longer import refuse_bound
from qpcompile.capture.record import TWO_TOKENS, Call, Recording, find_components, record, whole_cache
from qpcompile.capture.sample import PICTURES, PerToken, two_rows
from qpcompile.capture.sets_of_values import graphs_of_values
from qpcompile.capture.text_alone import learn_absent
from qpcompile.capture.trace import check_call, check_sizes, trace
from qpcompile.capture.unread import drop_unread
from qpcompile.capture.visual_path import rows_of_states, visual_path
from qpcompile.errors import CalibrationError, CaptureError, InputError
from qpcompile.ir.program import DECODE, HEAD, PREFILL, PROJECTOR, VISION, Graph, Program
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.recipe.plan import LeftOut, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.fixed_values import VALUES
from qpcompile.runtime.generation_options import first_line, plain_settings
from qpcompile.runtime.host import empty_host, fill_host, host_tensors
from qpcompile.runtime.machine import Machine, visual_tokens
from qpcompile.runtime.model_inputs import with_prompt
from qpcompile.runtime.prepare import IDS

# Largest distance of logits from the model's, of their spread, in float32.
EXACT = 1e-2
# Tokens of a decoder's own prompt while tracing, so that their number is not one.
MORE = 3
# How two rows are made of a sample, until the model takes them: inputs may have as many entries as the prompt by chance
# (patches of a picture), and floating-point ones may have an entry per token (places on a page).
WAYS: tuple[tuple[int, PerToken], ...] = ((0, "integers"), (-1, "integers"), (0, "none"), (0, "all"))
DECODER = (PREFILL, DECODE, HEAD)
# Components that may stay transformers' code on the host if they cannot be traced for every size of picture. The plan
# says so: what they compute is neither quantized nor exported.
ON_HOST = (VISION, PROJECTOR)
# The component and the index of its call that each graph is traced from. The decoder is first: no graph of it is a
# refusal, which takes seconds then.
SOURCES = (
    (PREFILL, "language", 0),
    (DECODE, "language", 1),
    (HEAD, "head", 0),
    (VISION, "vision", 0),
    (PROJECTOR, "projector", 0),
)


def capture(
    model: PreTrainedModel, sample: dict[str, Any], recipe: Recipe, others: Iterable[dict[str, Any]] = ()
) -> Program:
    """Trace every component of `model`, as called by one small `generate` on `sample`.

    others: further samples, read where a component has a graph per set of values; their sets get graphs too.

    Raises ModelError for a model that is not a VLM and CaptureError, with the component and the line of the model's
    code, if tracing fails or the graph differs from eager.
    """
    components = find_components(model)  # refuses a model that is not a VLM, before running it
    more = longer_by(model.get_submodule(components["language"]), sample)
    prompt, recording = recorded(model, sample, more)
    alone = record(model, sample)
    graphs: dict[str, Graph] = {}
    on_host: list[LeftOut] = []
    recordings = _Recordings(model, alone, others)
    for name, role, occurrence in SOURCES:
        call = recording.first(role, occurrence)
        if call is None:
            continue
        owner = recording.owners[role]
        if name == PREFILL:
            call.inputs[CACHE_ARGUMENT] = whole_cache(model, call.inputs.get(CACHE_ARGUMENT))
        if name == HEAD:
            call.inputs = {key: value[:, -1:].expand(-1, 2, -1).contiguous() for key, value in call.inputs.items()}
            call.output = model.get_submodule(owner)(**call.inputs)
        try:
            with component(f"{name} cannot be captured", owner or type(model).__name__):
                if name in ON_HOST:
                    _refuse_both(call, owner)
                graph = trace(name, owner, model.get_submodule(owner), call)
                check_sizes(graph)
                if name in ON_HOST and (other := alone.first(role, occurrence)) is not None:
                    check_call(graph, model.get_submodule(owner), other)
        except CaptureError as error:
            if name not in ON_HOST:
                raise
            found, left = graphs_of_values(name, owner, model.get_submodule(owner), recordings.calls(role), error)
            graphs |= found
            on_host.append(left)
            continue
        graphs[name] = graph
    # In the order of an answer.
    graphs = {**{name: graph for name, graph in graphs.items() if name not in DECODER}, **graphs}
    for name in (PREFILL, DECODE):
        name_other_layers(graphs[name])
    name_crossing(graphs)
    graphs[PREFILL].constants |= rows_of_states(graphs[PREFILL], recording, prompt, visual_tokens(model.config))
    if VISION in graphs and VALUES not in graphs[VISION].constants:
        graphs[VISION].constants |= visual_path(recording, prompt.get("input_ids"), visual_tokens(model.config))
    # Transformers' code of a component with graphs of values answers others, and needs its weights.
    held = _own_weights({name: graph for name, graph in graphs.items() if VALUES not in graph.constants})
    held -= recording.outside
    with component("transformers' code around the graphs cannot be kept", type(model).__name__):
        host = fill_host(empty_host(type(model), model.config), host_tensors(model, held), model.dtype)
    host.generation_config = copy.deepcopy(model.generation_config)
    layers = layers_of(graphs[PREFILL])
    program = Program(graphs, host, layers, recipe, Plan(recipe=recipe, layers=layers, left_out=tuple(on_host)))
    # Running binds a host to its program: run a copy, on the same tensors.
    tensors = [*host.parameters(), *host.buffers()]
    own = copy.deepcopy(host, {id(tensor): tensor for tensor in tensors})
    with component("the graphs do not run in place of the model's components", type(model).__name__):
        drop_unread(dataclasses.replace(program, host=own), prompt)
    _check_whole(dataclasses.replace(program, host=own), sample, alone)
    learn_absent(dataclasses.replace(program, host=own), model, sample)
    refuse_bound(dataclasses.replace(program, host=own), model, sample)
    return program


def name_crossing(graphs: dict[str, Graph]) -> None:
    """Name keys and values that decoding does not append to by cross-attention, which they are of."""
    decode = graphs[DECODE]
    given = dict(zip(decode.inputs, (node for node in decode.nodes if node.op == "placeholder"), strict=True))
    still = {path: path.crossing for path in decode.outputs if path.in_cache and decode.result(path) is given.get(path)}
    for graph in (graphs[PREFILL], decode):
        graph.inputs = tuple(still.get(path, path) for path in graph.inputs)
        graph.outputs = tuple(still.get(path, path) for path in graph.outputs)


def _check_whole(program: Program, sample: dict[str, Any], alone: Recording) -> None:
    """Compare an answer of the graphs with the model's, on the sample as it was given. CaptureError if they differ."""
    half = program.host.dtype != torch.float32
    try:
        with Machine(program) as machine:
            answer = machine.generate(**copy.deepcopy(sample), **(plain_settings(program.host) | TWO_TOKENS))
        found = torch.stack(answer.logits, dim=1)
    except (InputError, CalibrationError, RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _differs(program, f"they do not run: {type(error).__name__}: {first_line(error)}") from error
    far = logits_apart(found, alone.logits)
    if not far <= (HALF if half else EXACT):
        raise _differs(program, f"their logits are {far:.2g} of the spread off")


def _differs(program: Program, what: str) -> CaptureError:
    return CaptureError(
        f"the traced graphs do not answer the sample as {type(program.host).__name__} does: {what}",
        where=program.graphs[PREFILL].owner,
        do="report this family: its code takes a branch that tracing two rows does not see",
    )


def recorded(model: PreTrainedModel, sample: dict[str, Any], more: int = 1) -> tuple[dict[str, Any], Recording]:
    """Two rows made of a sample, longer by `more` tokens, and what the model calls on them.

    Raises CaptureError if it takes none of them.
    """
    pad = model.generation_config.pad_token_id
    filled, visual = pad if isinstance(pad, int) else 0, visual_tokens(model.config).tolist()
    given = with_prompt(model, sample, MORE)
    first: CaptureError | None = None
    for axis, per_token in WAYS:
        prompt = two_rows(given, filled, axis, per_token, visual, more)
        try:
            return prompt, record(model, prompt)
        except CaptureError as error:
            first = first or error
    assert first is not None
    raise first


def longer_by(decoder: torch.nn.Module, prompt: dict[str, Any]) -> int:
    """How many tokens are added to a prompt for tracing: one, or what makes it three chunks where layers go through it
    in chunks, since one chunk is taken for a constant.
    """
    sizes = [size for part in decoder.modules() if isinstance(size := getattr(part, "chunk_size", None), int)]
    ids = prompt.get("input_ids")
    return max(1, 2 * max(sizes, default=0) + 1 - ids.shape[1]) if ids is not None else 1


def _refuse_both(call: Call, owner: str) -> None:
    """Raise CaptureError for an encoder of prompt and pictures: a prompt without pictures has other inputs."""
    pictures = [key for key in call.inputs if key.startswith(PICTURES)]
    if pictures and call.inputs.get(IDS) is not None:
        raise CaptureError(
            f"it takes the prompt with {', '.join(pictures)}, and a prompt without pictures has another graph",
            where=owner,
            do="use the model as it is: this part is not compiled",
        )


class _Recordings:
    """The calls of components on the sample as it was given, then on others: recorded when they are asked for."""

    def __init__(self, model: PreTrainedModel, alone: Recording, others: Iterable[dict[str, Any]]) -> None:
        self.done, self.more = [alone], (record(model, other) for other in others)

    def calls(self, role: str) -> Iterator[Call]:
        """Every call of a component."""
        for recording in self.done:
            yield from (call for call in recording.calls if call.component == role)
        for recording in self.more:
            self.done.append(recording)
            yield from (call for call in recording.calls if call.component == role)


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
