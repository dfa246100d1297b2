"""Compose the three graphs of an ONNX folder from a program's graphs and the host's code between them.

    vision   pictures                                        -> image_features f[N, C]
    prefill  input_ids, image_features, masks, positions     -> logits f[B, V] of the last token, caches
    decode   input_ids i64[B, 1], masks, positions, caches   -> logits f[B, V], caches

Inputs keep the names they have in the program; an output that the next step takes back as `past_key_values.x` is
called `present.x`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves

from qpcompile.emit.onnx.runner.runner import FEATURES, IDS, LOGITS, ROWS, STATE, VISUAL_KEYS, VISUAL_SCORES
from qpcompile.emit.onnx.vision import host_chain
from qpcompile.errors import ExportError
from qpcompile.ir.edit import aten
from qpcompile.ir.names import CACHE, names
from qpcompile.ir.program import EMBED, HEAD, PREFILL, PROJECTOR, VISION, Graph, Program
from qpcompile.ir.shapes import identifier
from qpcompile.runtime.arguments import input_kinds
from qpcompile.runtime.fixed_values import SAID, VALUES
from qpcompile.runtime.generation_options import first_line
from qpcompile.runtime.model_inputs import vocabulary_size

EMBEDS, GRID = "inputs_embeds", "grid_thw"
SAID_BY_TOWER = (VISUAL_SCORES, VISUAL_KEYS)
END = 2**63 - 1


@dataclass(frozen=True)
class Part:
    """One graph to export: named tensors in the order of `inputs`, named tensors out."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def language(
    program: Program,
    name: str,
    rows: Sequence[str] = (),
    tables: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Part:
    """Compose token embeddings, a decoder graph and the head on the last token.

    rows: outputs of the vision graph that are other inputs of the decoder at visual tokens, `rows.<input>`. tables:
    such inputs elsewhere, for every token of the vocabulary; zero where there is no table.
    """
    graph, head = program.graphs[name], program.graphs[HEAD]
    host: Any = program.host
    image_token = host.config.image_token_id
    table = program.graphs.get(EMBED) or _embedding(host)
    embed = host.get_input_embeddings() if table is None else table.module
    builder = _Builder(torch.nn.ModuleDict({"decoder": graph.module, "head": head.module, "embed_tokens": embed}))
    ids = builder.input(IDS)
    known = ids
    if image_token >= vocabulary_size(host):
        # Placeholders beyond the table are never looked up.
        known = builder.call(aten.masked_fill.Scalar, ids, builder.call(aten.eq.Scalar, ids, image_token), 0)
    if table is None:
        values = {EMBEDS: builder.call(aten.embedding.default, builder.tensor("embed_tokens.weight"), known)}
    else:
        values = {EMBEDS: builder.inline("embed_tokens", table, {table.inputs[0]: known})["output"]}
    for path, table in tables.items():
        builder.root.register_buffer(f"table_{identifier(path)}", table)
        values[path] = builder.call(aten.index.Tensor, builder.tensor(f"table_{identifier(path)}"), [known])
    if name == PREFILL:
        values[EMBEDS] = _merge(builder, ids, values[EMBEDS], builder.input(FEATURES), image_token)
        for path in SAID_BY_TOWER:
            if path in graph.inputs:
                _, values[path] = _at_pictures(builder, ids, builder.input(path), image_token)
        for path in rows:
            if (of := path.removeprefix(f"{ROWS}.")) in graph.inputs and graph.placeholder(of).users:
                visual, dense = _at_pictures(builder, ids, builder.input(path), image_token)
                for _ in range(input_kinds(graph)[of][1] - 2):
                    visual = builder.call(aten.unsqueeze.default, visual, -1)
                if of in values:
                    values[of] = builder.call(aten.where.self, visual, dense, values[of])
                else:
                    values[of] = builder.call(aten.where.ScalarOther, visual, dense, 0.0)
    for path in graph.inputs:
        if path not in values and graph.placeholder(path).users:
            values[path] = builder.input(path)
    results = builder.inline("decoder", graph, values)
    last = builder.call(aten.slice.Tensor, results["last_hidden_state"], 1, -1, END)
    (logits,) = builder.inline("head", head, {head.inputs[0]: last}).values()
    state = [path for path in graph.outputs if path.root in STATE]
    outputs = {LOGITS: builder.call(aten.select.int, logits, 1, 0), **{present(path): results[path] for path in state}}
    return builder.finish(outputs)


def _embedding(host: Any) -> Graph | None:
    """The graph of token embeddings that are more than a table (a scale, a projection); None for a table."""
    embed: torch.nn.Module = host.get_input_embeddings()
    if type(embed) is torch.nn.Embedding:
        return None
    ids = torch.zeros(2, 3, dtype=torch.int64)
    axes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    try:
        exported = torch.export.export(embed, (ids,), dynamic_shapes=axes, strict=False).module(check_guards=False)
    except Exception as error:
        raise _unknown(f"token embeddings of the kind {type(embed).__name__}: {first_line(error)}", EMBED) from error
    exported.graph.set_codegen(CodeGen())
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    output.args = (tuple(tree_leaves(output.args[0])),)
    return Graph(EMBED, fx.GraphModule(exported, exported.graph), names(["input"]), names(["output"]), "")


def vision(program: Program) -> Part:
    """Compose everything from pictures to the features that replace image tokens.

    A tower over packed patches of any picture size is exported as its graph; for a fixed-size tower the host's own
    chain of tower, layer selection and projector is traced.
    """
    if VISION not in program.graphs:
        raise _unknown("pictures that become tokens without a tower that was traced", VISION)
    if one := next((graph for graph in program.graphs.values() if VALUES in graph.constants), None):
        raise _unknown(f"a {one.name} graph of {one.constants[SAID]} only", one.name)
    graph = program.graphs[VISION]
    if GRID not in graph.inputs:
        return _fixed_vision(program)
    if "pooler_output" not in graph.outputs:
        raise _unknown(f"a vision tower that returns {', '.join(graph.outputs)}", VISION)
    builder = _Builder(torch.nn.ModuleDict({"tower": graph.module}))
    values: dict[str, fx.Node] = {path: builder.input(path) for path in graph.inputs if graph.placeholder(path).users}
    results = builder.inline("tower", graph, values)
    return builder.finish({FEATURES: results["pooler_output"], **_said_by_tower(results)})


def _fixed_vision(program: Program) -> Part:
    tower, projector = program.graphs[VISION], program.graphs.get(PROJECTOR)
    chain = host_chain(program)
    if chain is None:
        raise _unknown(f"what {type(program.host).__name__} does with pictures around its tower", VISION)
    root = {"tower": tower.module} | ({"between": chain.between.module} if chain.between else {})
    builder = _Builder(torch.nn.ModuleDict(root | ({"projector": projector.module} if projector else {})))
    values = builder.inline("tower", tower, {path: builder.input(path) for path in tower.inputs})
    said = _said_by_tower(values)
    if projector is not None and chain.between is not None:
        values = builder.inline("between", chain.between, values)
        values = builder.inline("projector", projector, {path: values[path] for path in projector.inputs})
    features = builder.call(aten.flatten.using_ints, values[chain.features], 0, -2)
    return builder.finish({FEATURES: features, **said})


def _said_by_tower(results: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    return {path: results[path] for path in SAID_BY_TOWER if path in results}


def present(path: str) -> str:
    """The name of the output that becomes the input `path` of the next decode step."""
    return f"present.{path.removeprefix(CACHE + '.')}"


def _unknown(what: str, where: str) -> ExportError:
    return ExportError(
        f"the ONNX runner has no code for {what}",
        where=where,
        do="use the compiled module: this family cannot be written as an ONNX folder yet",
    )


def _merge(builder: _Builder, ids: fx.Node, embeds: fx.Node, features: fx.Node, image_token: int) -> fx.Node:
    """Replace image tokens, in reading order over the batch, by the rows of `features`: f[N, C]."""
    visual, rows = _at_pictures(builder, ids, features, image_token)
    return builder.call(aten.where.self, builder.call(aten.unsqueeze.default, visual, -1), rows, embeds)


def _at_pictures(builder: _Builder, ids: fx.Node, rows: fx.Node, image_token: int) -> tuple[fx.Node, fx.Node]:
    """Which tokens are image tokens, bool[B, S], and `rows: f[N, ...]` there, f[B, S, ...]: anything elsewhere."""
    visual = builder.call(aten.eq.Scalar, ids, image_token)
    counted = builder.call(aten.to.dtype, builder.call(aten.reshape.default, visual, [-1]), torch.int64)
    order = builder.call(aten.sub.Tensor, builder.call(aten.cumsum.default, counted, 0), 1)
    sizes = [builder.call(aten.sym_size.int, ids, axis) for axis in (0, 1)]
    index = builder.call(aten.reshape.default, builder.call(aten.clamp.default, order, 0), sizes)
    return visual, builder.call(aten.index.Tensor, rows, [index])


class _Builder:
    """Composes graphs to one new graph over `root`."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self.graph = fx.Graph()
        self.inputs: list[str] = []
        self._last_input: fx.Node | None = None

    def input(self, path: str) -> fx.Node:
        """A new input called `path`; inputs come before all other nodes."""
        before = self._last_input.next if self._last_input is not None else next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(before):
            self._last_input = self.graph.placeholder(identifier(path))
        self.inputs.append(path)
        return self._last_input

    def tensor(self, name: str) -> fx.Node:
        """A tensor of `root`."""
        return self.graph.get_attr(name)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call of an operator."""
        return self.graph.call_function(target, args)

    def inline(self, prefix: str, graph: Graph, values: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """Copy the nodes of `graph`, which is in `root` as `prefix`; returns its results by name."""
        mapped: dict[fx.Node, fx.Node] = {}
        for path, node in zip(graph.inputs, (n for n in graph.nodes if n.op == "placeholder"), strict=True):
            if path in values:
                mapped[node] = values[path]
        for node in graph.nodes:
            if node.op == "get_attr":
                mapped[node] = self.graph.get_attr(f"{prefix}.{node.target}")
            elif node.op == "call_function":
                mapped[node] = self.graph.node_copy(node, lambda old: mapped[old])
        return {path: mapped[graph.result(path)] for path in graph.outputs}

    def finish(self, outputs: Mapping[str, fx.Node]) -> Part:
        """The graph that returns `outputs`."""
        self.graph.output(tuple(outputs.values()))
        for node in reversed(self.graph.nodes):
            if "assert" in getattr(node.target, "__name__", "") and not node.users:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        return Part(fx.GraphModule(self.root, self.graph), tuple(self.inputs), tuple(outputs))
