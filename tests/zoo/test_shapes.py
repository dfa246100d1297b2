"""Families in shapes that showed what the standard one does not: answers are the model's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import one
from one import Road

from qpcompile.ir.program import PREFILL
from qpcompile.pruning.pruner import attention_layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gemma3", "odd"),  # a window longer than the prompts: masks are omitted
        ("qwen3_5", "suite"),  # a prompt shorter than the kernel of a convolution
        ("inkling2", "standard"),  # a window beside a layer's states
        ("udop", "standard"),  # places of tokens, which are no integers
        ("udop", "suite"),  # prompts of one token, of encoder and decoder
    ],
)
def test_answers_are_the_models(name: str, shape: str) -> None:
    road = Road(name, shape)
    road.build()
    road.capture()
    road.none()


@pytest.mark.slow
def test_a_searched_schedule_cuts_after_layers_that_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one.RECIPES, "joint", ("joint-30-w4a8", []))
    road = Road("qwen3_5", "odd")
    road.build()
    road.capture()
    road.recipe("joint")
    program = road.compiled["joint"].program
    assert {cut.layer for cut in program.plan.cuts} <= {-1, *attention_layers(road.program.graphs[PREFILL])}
