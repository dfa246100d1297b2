"""A decoder layer of every family is ten operators in prefill and eight in decode; nothing in it nearly matched.

python -m pytest -m slow tests/test_layer_operators.py        about five minutes on one core
"""

from __future__ import annotations

import pytest
from families import FAMILIES
from layer_operators import LAYER, PROMPT, STEP, operators

import qpcompile
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.program import DECODE, PREFILL
from qpcompile.recipe.recipe import Recipe

QUICK = ("quantize.transform=hadamard", "quantize.weights.solver=rtn")
NORMS = {
    "qwen3_vl": "queries and keys have norms of their own, between their projection and the rotary embedding",
    "gemma3": "the same, and norms after attention and MLP, before their residual sums",
}
"""Families with more operators, all of them in norms, and why."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_ten_operators_and_eight(family: str) -> None:
    model, cases = FAMILIES[family]()
    recipe = Recipe.load("w4a4kv4").with_overrides(QUICK)
    program = qpcompile.compile(model, recipe, calibration=[cases["one"]]).program
    for name, attention, count in ((PREFILL, PROMPT, 10), (DECODE, STEP, 8)):
        found, expected = operators(program.graphs[name]), LAYER + attention
        assert expected.total() == count
        if family in NORMS:
            assert found["rmsnorm"] >= 2 and found.total() > count
            assert all(found[each] == expected[each] for each in expected if each.startswith(("linear", "rope", "att")))
        else:
            assert found == expected
    assert not [miss for miss in program.measured[NEAR_MISSES] if miss.graph in (PREFILL, DECODE)]
