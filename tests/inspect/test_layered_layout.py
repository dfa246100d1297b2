"""Rows and positions: each node below its inputs, no boxes overlap."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qpcompile.inspect.layered_layout import Layout, place

GAP = 10.0


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    size = draw(st.integers(1, 14))
    return {
        f"n{index}": [f"n{source}" for source in draw(st.lists(st.integers(0, index - 1), max_size=3))] if index else []
        for index in range(size)
    }


@given(graphs())
def test_sources_are_above_and_boxes_are_apart(sources: dict[str, list[str]]) -> None:
    widths = {name: 20.0 + 7 * (index % 4) for index, name in enumerate(sources)}
    layout = place(sources, widths, GAP)
    assert set(layout.places) == set(sources)
    for name, read in sources.items():
        for source in read:
            rows = layout.places[name][1] - layout.places[source][1]
            assert rows >= 1 and len(layout.routes[source, name]) == rows + 1
    for row in range(layout.rows):
        boxes = sorted((x, widths[name]) for name, (x, at) in layout.places.items() if at == row)
        for (left, one), (right, other) in pairwise(boxes):
            assert right - left >= (one + other) / 2 + GAP - 1e-6
    assert all(
        x - widths[name] / 2 >= -1e-6 and x + widths[name] / 2 <= layout.width + 1e-6
        for name, (x, _) in layout.places.items()
    )


def test_chain_is_straight_and_input_stands_next_to_its_reader() -> None:
    layout: Layout = place(
        {"a": [], "b": ["a"], "mask": [], "c": ["b"], "d": ["c", "mask"]},
        dict.fromkeys("abcd", 30.0) | {"mask": 50.0},
        GAP,
    )
    assert [layout.places[name][1] for name in "abcd"] == [0, 1, 2, 3]
    assert layout.places["mask"][1] == 2
    assert layout.places["a"][0] == layout.places["b"][0]
