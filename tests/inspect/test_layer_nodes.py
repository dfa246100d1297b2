"""A part of a printed graph as nodes."""

from __future__ import annotations

import pytest

from qpcompile.errors import InvariantError
from qpcompile.inspect.layer_nodes import layer_names, layer_nodes, layer_text


def test_layers_are_listed_once(printed: str) -> None:
    assert layer_names(printed) == ["layers.0", "layers.1"]


def test_text_of_a_layer_is_its_lines(printed: str) -> None:
    lines = layer_text(printed, "layers.1").splitlines()
    assert lines[0].startswith("@layers.1.up.weight_packed") and lines[-1].startswith("%11 = ") and len(lines) == 9
    assert not any(line.startswith(("return", "%8", "%3 =")) for line in lines)


def test_nodes_know_sources_weights_and_readers(printed: str) -> None:
    nodes = {node.name: node for node in layer_nodes(printed, "layers.1")}
    assert list(nodes) == ["%3", "%0", "%4", "%5", "%6", "%7", "%9", "%10", "%11"]
    assert [name for name, node in nodes.items() if node.outside] == ["%3", "%0"]
    assert nodes["%0"].operator == "mask"
    assert nodes["%6"].operator == "item 1"
    assert nodes["%7"].sources == ("%5", "%6")
    assert nodes["%7"].weights == ("layers.1.up.weight_packed", "layers.1.up.weight_scale")
    assert nodes["%9"].sources == ("%7",), "sizes are not drawn"
    assert nodes["%10"].leaves == ("cache.0",) and nodes["%11"].leaves == ("",) and nodes["%4"].leaves == ()


def test_part_that_is_not_there(printed: str) -> None:
    with pytest.raises(InvariantError, match=r"layers\.7"):
        layer_nodes(printed, "layers.7")
