"""The family `column_llava` answers after capture as before; its adapter gives the tower a graph for all sizes."""

from __future__ import annotations

from unittest import mock

from families import FAMILIES
from test_families import check_same_answers

from qpcompile.capture.adapters import ADAPTERS
from qpcompile.capture.capture import capture
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine

model, cases = FAMILIES["column_llava"]()
program = capture(model, cases["one"], Recipe.load("none"))
check_same_answers("column_llava", model, Machine(program), cases)

others = {name: adapter for name, adapter in ADAPTERS.items() if name != "ColumnTower"}
with mock.patch.dict(ADAPTERS, others, clear=True):
    left = capture(FAMILIES["column_llava"]()[0], cases["one"], Recipe.load("none")).plan.left_out
    assert [each.graph for each in left] == ["vision"] and not program.plan.left_out, left
