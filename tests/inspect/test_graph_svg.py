"""The drawing of a layer."""

from __future__ import annotations

from xml.etree import ElementTree

from qpcompile.inspect.graph_svg import layer_svg
from qpcompile.ir.program import Graph

SPACE = "{http://www.w3.org/2000/svg}"


def test_every_operator_is_a_box_and_every_value_a_line(graph: Graph) -> None:
    root = ElementTree.fromstring(layer_svg(graph, "layers.1"))
    assert len(list(root.iter(f"{SPACE}rect"))) == 9
    assert len([path for path in root.iter(f"{SPACE}path") if path.get("class") == "a"]) == 10
    words = [text.text for text in root.iter(f"{SPACE}text")]
    for expected in (
        "qpcompile::linear_int",
        "up",
        "item 0 i8[B, S0, 4]",
        "%0 mask",
        "returned as cache.0",
        "read outside",
    ):
        assert expected in words
    kinds = [group.get("class") for group in root.iter(f"{SPACE}g")]
    assert kinds.count("q") == 2 and kinds.count("s") == 3 and kinds.count("i") == 2


def test_drawing_is_stable_and_inside_its_frame(graph: Graph) -> None:
    svg = layer_svg(graph, "layers.1")
    assert svg == layer_svg(graph, "layers.1")
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for box in root.iter(f"{SPACE}rect"):
        assert 0 <= float(box.get("x", -1)) <= float(box.get("x", 0)) + float(box.get("width", 0)) <= width
        assert 0 <= float(box.get("y", -1)) <= float(box.get("y", 0)) + float(box.get("height", 0)) <= height


def test_element_for_a_page_names_no_address(graph: Graph) -> None:
    assert "http" not in layer_svg(graph, "layers.1", standalone=False)


def test_outline_has_neither_types_nor_views(graph: Graph) -> None:
    root = ElementTree.fromstring(layer_svg(graph, "layers.1", outline=True))
    words = [text.text for text in root.iter(f"{SPACE}text")]
    assert words == [
        "%3 relu",
        "quantize_dynamic",
        "linear_int",
        "up",
        "add",
        "leaves",
        "mul",
        "leaves",
    ]
    # relu to quantizer and add, quantizer to linear past its two items, linear to add past a view, add to mul.
    assert len([path for path in root.iter(f"{SPACE}path") if path.get("class") == "a"]) == 5
