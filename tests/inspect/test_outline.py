"""What only moves values is left out; what computes reads the nearest above it."""

from __future__ import annotations

from qpcompile.inspect.layer_nodes import Node
from qpcompile.inspect.outline import outlined

INPUT = Node("%0", "aten::add.Tensor", (), "f32[B, 4]", (), outside=True)
MASK = Node("%1", "visual_mask", (), "bool[B, 4]", (), outside=True)


def test_views_and_index_arithmetic_are_left_out() -> None:
    nodes = [
        INPUT,
        MASK,
        Node("%2", "aten::view", (), "f32[B, 2, 2]", ("%0",)),
        Node("%3", "aten::cumsum", (), "i64[B, 4]", ("%1",)),
        Node("%4", "aten::_assert_tensor_metadata", (), "", ("%2",)),
        Node("%5", "qpcompile::select_tokens", (), "(i64[B, S], bool[B, S])", ("%2", "%3")),
        Node("%6", "item 0", (), "i64[B, S]", ("%5",), leaves=("kept.0",)),
        Node("%7", "aten::gather", (), "f32[B, S]", ("%2", "%6")),
    ]
    found = outlined(nodes)
    assert [(node.name, node.sources) for node in found] == [("%0", ()), ("%5", ("%0",)), ("%7", ("%0", "%5"))]
    assert found[1].leaves == ("kept.0",), "a value that leaves by an item leaves by what made it"


def test_a_mask_that_an_operator_of_ours_makes_stays() -> None:
    nodes = [INPUT, Node("%2", "qpcompile::spread_tokens", (), "bool[B, 4]", ("%0",))]
    assert [node.name for node in outlined(nodes)] == ["%0", "%2"]


def test_what_nobody_reads_is_left_out() -> None:
    other = Node("%9", "aten::cos", (), "f32[B, 4]", (), outside=True)
    constant = Node("%3", "aten::lift_fresh_copy", ("empty",), "f32[0]", ())
    nodes = [INPUT, other, constant, Node("%4", "aten::cat", (), "f32[B, 4]", ("%3", "%0"))]
    assert [(node.name, node.sources) for node in outlined(nodes)] == [("%0", ()), ("%4", ("%0",))]
