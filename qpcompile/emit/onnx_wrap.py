"""The three modules of an ONNX folder, built from a program's graphs and the host's code between them.

    vision   pictures                                        -> image_features f[N, C]
    prefill  input_ids, image_features, masks, positions     -> logits f[B, V] of the last token, caches
    decode   input_ids i64[B, 1], masks, positions, caches   -> logits f[B, V], caches

All three take tensors in the order of `inputs` and return them in the order of `outputs`; outputs that have the
name of an input are called `present.*` where the input is `past_key_values.*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qpcompile.emit.onnx_runner import FEATURES, IDS, LOGITS
from qpcompile.errors import ExportError
from qpcompile.ir.arguments import keyword_arguments
from qpcompile.ir.program import DECODE, HEAD, PREFILL, PROJECTOR, VISION, Graph, Program
from qpcompile.ir.structure import CACHE, named_tensors, rebuild

EMBEDS, PICTURES, GRID = "inputs_embeds", "pixel_values", "grid_thw"


class Component(torch.nn.Module):
    """One module to export: named tensors in, a tuple of named tensors out."""

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs

    def _named(self, args: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return dict(zip(self.inputs, args, strict=True))


class FixedVision(Component):
    """A tower whose pictures all have one size: the host's own chain of tower, choice of layer and projector."""

    def __init__(self, program: Program) -> None:
        super().__init__((PICTURES,), (FEATURES,))
        self.host = _Apart(program.host)
        self.graphs = {name: program.graphs[name] for name in (VISION, PROJECTOR) if name in program.graphs}
        self.modules_ = torch.nn.ModuleList(graph.module for graph in self.graphs.values())

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _bound(self.host.module, self.graphs):
            found = self.host.module.get_image_features(args[0])
        features = getattr(found, "pooler_output", found)
        parts = [features] if isinstance(features, torch.Tensor) else list(features)
        return (torch.cat([part.flatten(0, -2) for part in parts]),)


class PackedVision(Component):
    """A tower over patches of pictures of any size, packed one after the other: its graph, as it is."""

    def __init__(self, program: Program) -> None:
        graph = program.graphs[VISION]
        super().__init__(_used(graph), (FEATURES,))
        self.graph = graph
        self.module = graph.module

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = self._named(args)
        results = self.graph({name: feeds.get(name, _NOTHING) for name in self.graph.inputs})
        return (results["pooler_output"],)


class Language(Component):
    """Token embeddings, the decoder graph and the head on the last token."""

    def __init__(self, program: Program, name: str) -> None:
        graph = program.graphs[name]
        features = (FEATURES,) if name == PREFILL else ()
        inputs = (IDS, *features, *(path for path in _used(graph) if path != EMBEDS))
        self.states = tuple(path for path in graph.outputs if path.split(".")[0] in (CACHE, "kept", "alive"))
        super().__init__(inputs, (LOGITS, *(present(path) for path in self.states)))
        self.graph = graph
        self.head_graph = program.graphs[HEAD]
        self.module, self.head = graph.module, self.head_graph.module
        self.embed = program.host.get_input_embeddings()
        self.image_token = program.host.config.image_token_id

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = self._named(args)
        ids = feeds.pop(IDS)
        embeds = self.embed(ids)
        if FEATURES in feeds:
            embeds = _merge(embeds, feeds.pop(FEATURES), ids == self.image_token)
        feeds[EMBEDS] = embeds
        results = self.graph({name: feeds.get(name, _NOTHING) for name in self.graph.inputs})
        last = results["last_hidden_state"][:, -1:]
        (logits,) = self.head_graph({self.head_graph.inputs[0]: last}).values()
        return (logits[:, 0], *(results[path] for path in self.states))


_NOTHING = torch.empty(0)


class _Apart:
    """Keeps a module out of the parameters of its holder."""

    def __init__(self, module: Any) -> None:
        self.module = module


def present(path: str) -> str:
    """The name of the output that becomes the input `path` of the next step."""
    return f"present.{path.removeprefix(CACHE + '.')}"


def vision(program: Program) -> Component:
    """The module of vision.onnx."""
    graph = program.graphs[VISION]
    if GRID in graph.inputs:
        if "pooler_output" not in graph.outputs:
            raise ExportError(
                f"the vision tower returns {', '.join(graph.outputs)}, and which of them are the visual tokens is not known",
                where="vision",
                do="use the compiled module: the ONNX runner has no code for this family",
            )
        return PackedVision(program)
    return FixedVision(program)


def _merge(embeds: torch.Tensor, features: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """embeds: f[B, S, C]; features: f[N, C], in reading order; visual: bool[B, S]. Each visual token gets the next one."""
    order = visual.flatten().to(torch.int64).cumsum(0).view(visual.shape) - 1
    rows = features[order.clamp(min=0)]
    return torch.where(visual[..., None], rows.to(embeds.dtype), embeds)


def _used(graph: Graph) -> tuple[str, ...]:
    """Inputs that the graph reads."""
    return tuple(name for name in graph.inputs if graph.placeholder(name).users)


@contextmanager
def _bound(host: Any, graphs: dict[str, Graph]) -> Iterator[None]:
    """For the time of a call, components of the host run their graphs."""
    modules = [host.get_submodule(graph.owner) for graph in graphs.values()]
    before = [module.__dict__.get("forward") for module in modules]
    for module, graph in zip(modules, graphs.values(), strict=True):
        module.forward = _caller(module, graph)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _caller(module: torch.nn.Module, graph: Graph) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        feeds = dict(named_tensors(keyword_arguments(module, args, kwargs)))
        return rebuild(graph.returns, graph({name: feeds[name] for name in graph.inputs}))

    return forward
