"""A part of a graph as nodes."""

from __future__ import annotations

import pytest

from qpcompile.errors import InvariantError
from qpcompile.inspect.layer_nodes import layer_names, layer_nodes, layer_text
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text

PRINTED = """\
graph prefill of model
%0 = input mask : bool[B, S0]
%1 = input x : f32[B, S0, 4]
%2 = aten::sym_size.int(%1, 1) : int S0
# layers.0
%3 = aten::relu(%1) : f32[B, S0, 4]
# layers.1
%4 = qpcompile::quantize_dynamic(%3, 0, 1.0, 4) : (i8[B, S0, 4], f32[B, S0, 1])
%5 = operator.getitem(%4, 0) : i8[B, S0, 4]
%6 = operator.getitem(%4, 1) : f32[B, S0, 1]
@layers.1.up.weight_packed : u8[4, 2]
@layers.1.up.weight_scale : f32[4, 1]
%7 = qpcompile::linear_int(%5, %6, @layers.1.up.weight_packed, @layers.1.up.weight_scale, None, f32, 4) : f32[B, S0, 4]
# top
%8 = aten::sym_size.int(%0, 0) : int B
# layers.1
%9 = aten::view(%7, [%8, %2, 4]) : f32[B, S0, 4]
%10 = aten::add.Tensor(%3, %9) : f32[B, S0, 4]
%11 = aten::mul.Tensor(%10, %0) : f32[B, S0, 4]
# norm
%12 = aten::neg(%11) : f32[B, S0, 4]
return hidden = %12
return cache.0 = %10
"""


def test_the_graph_prints_as_this_text(graph: Graph) -> None:
    assert graph_text(graph) == PRINTED


def test_layers_are_listed_once(graph: Graph) -> None:
    assert layer_names(graph) == ["layers.0", "layers.1"]


def test_text_of_a_layer_is_its_lines() -> None:
    lines = layer_text(PRINTED, "layers.1").splitlines()
    assert lines[0].startswith("%4 = ") and lines[3].startswith("@layers.1.up.weight_packed")
    assert lines[-1].startswith("%11 = ") and len(lines) == 9
    assert not any(line.startswith(("return", "%8", "%3 =")) for line in lines)
    assert layer_text(PRINTED, "norm") == "%12 = aten::neg(%11) : f32[B, S0, 4]\n"


def test_nodes_know_sources_weights_and_readers(graph: Graph) -> None:
    nodes = {node.name: node for node in layer_nodes(graph, "layers.1")}
    assert list(nodes) == ["%3", "%0", "%4", "%5", "%6", "%7", "%9", "%10", "%11"]
    assert [name for name, node in nodes.items() if node.outside] == ["%3", "%0"]
    assert nodes["%0"].operator == "mask"
    assert nodes["%6"].operator == "item 1"
    assert nodes["%7"].sources == ("%5", "%6")
    assert nodes["%7"].weights == ("layers.1.up.weight_packed", "layers.1.up.weight_scale")
    assert nodes["%9"].sources == ("%7",), "sizes are not drawn"
    assert nodes["%9"].type == "f32[B, S0, 4]" and nodes["%4"].type == "(i8[B, S0, 4], f32[B, S0, 1])"
    assert nodes["%10"].leaves == ("cache.0",) and nodes["%11"].leaves == ("",) and nodes["%4"].leaves == ()


def test_part_that_is_not_there(graph: Graph) -> None:
    with pytest.raises(InvariantError, match=r"layers\.7"):
        layer_nodes(graph, "layers.7")
