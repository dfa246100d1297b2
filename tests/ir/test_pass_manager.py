"""Passes run in order, are verified, and record what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from programs import program_of

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, call
from qpcompile.ir.pass_manager import PassRun, operator_counts, run_passes
from qpcompile.ir.program import Program
from qpcompile.stages import Stage


@dataclass(frozen=True)
class Relu:
    """Inserts another relu after the first one of the prefill graph; `broken` omits its shape."""

    broken: bool = False
    name: ClassVar[str] = "relu"
    purpose: ClassVar[str] = "Insert a relu."
    needs: ClassVar[Stage] = "captured"
    gives: ClassVar[Stage] = "canonical"

    def run(self, program: Program) -> bool:
        graph = program.graphs["prefill"]
        node = graph.nodes[1]
        with graph.module.graph.inserting_after(node):
            more = graph.module.graph.call_function(aten.relu.default, (node,))
        node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
        if not self.broken:
            more.meta["val"] = node.meta["val"]
        return True


@dataclass(frozen=True)
class Late:
    """Needs a late stage."""

    ran: list[str] = field(default_factory=list)
    name: ClassVar[str] = "late"
    purpose: ClassVar[str] = "Run late."
    needs: ClassVar[Stage] = "quantized"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        self.ran.append(program.stage)
        return False


def test_steps_hold_what_changed() -> None:
    program = program_of()
    seen: list[tuple[PassRun, str]] = []
    steps = run_passes(program, [Relu(), Relu()], lambda step, program: seen.append((step, program.stage)))
    assert [step.name for step in steps] == ["relu", "relu"] == program.history
    assert seen == [(step, "canonical") for step in steps]
    assert steps[0].before["prefill"] == {"aten::relu": 1} and steps[1].after["prefill"] == {"aten::relu": 3}
    assert steps[0].after["decode"] == {"aten::relu": 1} and steps[0].modified


def test_a_pass_runs_at_its_stages_only() -> None:
    program = program_of(stage="quantized")
    late = Late()
    run_passes(program, [late, late])
    assert program.stage == "fused" and late.ran == ["quantized", "fused"]
    with pytest.raises(InvariantError, match="relu runs at the stages captured to canonical, the program is fused"):
        run_passes(program, [Relu()])


def test_a_pass_too_early_does_not_run() -> None:
    late = Late()
    with pytest.raises(InvariantError, match="at the stages quantized to fused, the program is canonical") as error:
        run_passes(program_of(), [Relu(), late])
    assert error.value.ran == "relu" and not late.ran
    assert "qpcompile/pass_list.py" in str(error.value)


def test_a_pass_that_breaks_the_program_is_named() -> None:
    with pytest.raises(InvariantError, match="has no shape") as error:
        run_passes(program_of(), [Relu(), Relu(broken=True)])
    assert error.value.ran == "relu" and error.value.before == ("relu",)


def test_counts_name_plain_functions_too() -> None:
    program = program_of()
    counts = operator_counts(program)
    assert counts == {name: {"aten::relu": 1} for name in ("vision", "prefill", "decode")}


@dataclass(frozen=True)
class Transpose:
    """Inserts a transpose of axes that the value does not have."""

    name: ClassVar[str] = "transpose"
    purpose: ClassVar[str] = "Insert a transpose."
    needs: ClassVar[Stage] = "captured"
    gives: ClassVar[Stage] = "canonical"

    def run(self, program: Program) -> bool:
        graph = program.graphs["prefill"]
        call(graph, graph.output_node, aten.transpose.int, graph.nodes[1], 0, 9)
        return True


def test_an_exception_inside_a_pass_names_pass_and_node() -> None:
    with pytest.raises(InvariantError, match="transpose failed: IndexError: Dimension out of range") as error:
        run_passes(program_of(), [Relu(), Transpose()])
    assert error.value.ran == "transpose" and error.value.before == ("relu",)
    assert "at transpose_int of the prefill graph, a call of aten.transpose.int; " in str(error.value)
