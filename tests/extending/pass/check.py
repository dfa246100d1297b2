"""The pass `drop_identities` runs where the list has it, and the report and a dry run know it."""

from __future__ import annotations

from pathlib import Path

import torch
from programs import program_of, run, traced

from qpcompile.cli.dry_run import forecast
from qpcompile.inspect.tables import pass_purposes
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.pass_manager import run_passes
from qpcompile.pass_list import passes
from qpcompile.recipe.recipe import Recipe


class AddsZero(torch.nn.Module):
    """A sum that is its operand, and one that is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 0) + 1


graph = traced(AddsZero(), {"x": torch.ones(2, 3)})
feeds = {"x": torch.tensor([[-1.0, 0.0, 2.0]])}
before = run(graph, **feeds)["y"]
program = program_of(graph)
steps = run_passes(program, passes((), 0)[:2])
assert [(step.name, step.modified) for step in steps] == [("canonicalize", False), ("drop_identities", True)], steps
assert len(list(calls(graph, aten.add.Tensor))) == 1
assert torch.equal(run(graph, **feeds)["y"], before)

assert pass_purposes()["drop_identities"] == "Remove additions of zero."
model = Path(__file__).resolve().parents[2] / "testbed" / "llava"
assert ("drop_identities", "Remove additions of zero.") in forecast(model, Recipe.load("none"), None).steps
