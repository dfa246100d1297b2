"""Footprints: every weight of the decoder's linears once, and the cache at the end of an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from families import LAYERS, llava
from torch import fx

from qpcompile.evaluate.run.footprint import cache_footprint, decoder_linear_bytes
from qpcompile.ir.names import names
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.program import Graph

aten = torch.ops.aten


def program_of(graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> Any:
    """A program with this prefill graph."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    prefill = Graph("prefill", fx.GraphModule(root, graph), names(("x",)), names(("y",)), "model")
    return SimpleNamespace(graphs={"prefill": prefill})


def test_weights_scales_and_biases_count_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    q, scale, packed, weight_scale, bias, dense, table = (
        graph.get_attr(name) for name in ("q", "scale", "packed", "weight_scale", "bias", "dense", "table")
    )
    four = graph.call_function(LINEAR_INT, (x, x, packed, weight_scale, bias, torch.float32))
    again = graph.call_function(LINEAR_INT, (four, four, packed, weight_scale, None, torch.float32))
    cast = graph.call_function(aten.to.dtype, (dense, torch.float32))
    y = graph.call_function(aten.linear.default, (again, cast))
    graph.output((graph.call_function(aten.add.Tensor, (y, table)), q, scale))
    tensors = {
        "packed": torch.zeros(8, 16, dtype=torch.uint8),
        "weight_scale": torch.zeros(8, 1),
        "bias": torch.zeros(8),
        "dense": torch.zeros(4, 8, dtype=torch.float16),
        **{name: torch.zeros(100) for name in ("q", "scale", "table")},
    }
    expected = 8 * 16 + 8 * 4 + 8 * 4 + 4 * 8 * 2
    assert decoder_linear_bytes(program_of(graph, tensors)) == expected


def test_cache_at_the_end_of_an_answer() -> None:
    model, cases = llava()
    generate: Any = model.generate
    size = cache_footprint(generate, cases["one"], 3)
    # The last token's keys and values are never computed. Two heads of 12 channels, keys and values.
    numbers = LAYERS * 2 * 2 * 12 * (cases["one"]["input_ids"].shape[1] + 2)
    assert (size.stored, size.fp16) == (4 * numbers, 2 * numbers)
