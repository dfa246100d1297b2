"""Plots: SVG for embedding in a page, deterministic, with the page's colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from qpcompile.inspect.schedule import profile_svg, schedule_svg
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg.replace("xlink:", "")).iter("text")]


def test_every_layer_carries_its_count(plan: Plan) -> None:
    found = texts(schedule_svg(plan, 144))
    assert [count for count in found if count in ("144", "72", "44")] == ["144", "144", "72", "72", "44", "44"]
    assert "mean 86.7" in found


@pytest.mark.parametrize("draw", [lambda plan: schedule_svg(plan, 144), profile_svg], ids=["schedule", "profile"])
def test_drawing_stands_alone_and_is_stable(plan: Plan, draw: Callable[[Plan], str]) -> None:
    svg = draw(plan)
    assert svg.startswith('<svg class="plot"') and svg == draw(plan)
    assert "http" not in svg and "metadata" not in svg
    assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that does not follow the page"
    assert "var(--accent)" in svg and "var(--second)" in svg


def test_profile_shades_candidates_and_names_what_it_shows(plan: Plan) -> None:
    svg = profile_svg(plan)
    assert svg.count("var(--shade)") == 3 * len(plan.candidate_layers)
    for title in ("sensitivity", "attention concentration", "redundancy"):
        assert any(text.startswith(title) for text in texts(svg))


def test_nothing_measured_is_no_drawing() -> None:
    assert profile_svg(Plan(recipe=Recipe.load("none"))) == ""


def test_panels_without_facts_are_left_out(plan: Plan) -> None:
    svg = profile_svg(plan.model_copy(update={"facts": ()}))
    assert "sensitivity" in svg and "redundancy" not in svg
