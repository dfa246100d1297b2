"""Pass manager: the pass protocol, and running a list of passes (check the stage, run, verify, record)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from qpcompile.errors import InvariantError
from qpcompile.ir.heap import trim
from qpcompile.ir.measurements import Measurement
from qpcompile.ir.program import STAGES, Program
from qpcompile.ir.verify import verify


class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    `name` is that of its file; `purpose` one sentence for the report; `needs` is the earliest stage it can run at,
    `gives` the stage it produces. `run` edits the program in place and returns whether it changed anything.
    """

    name: ClassVar[str]
    purpose: ClassVar[str]
    needs: ClassVar[str]
    gives: ClassVar[str]

    def run(self, program: Program) -> bool: ...


@dataclass(frozen=True)
class Step:
    """The record of one pass run: operator counts per graph before and after, and whether it changed anything."""

    name: str
    modified: bool
    before: dict[str, dict[str, int]]
    after: dict[str, dict[str, int]]


STEPS: Measurement[list[Step]] = Measurement("steps")


def run_passes(
    program: Program, passes: Sequence[Pass], after: Callable[[Step, Program], None] | None = None
) -> list[Step]:
    """Run passes in order, and verify the program after every one of them.

    Raises InvariantError if the program has not reached the stage a pass needs, or a pass breaks the rules of its
    stage.
    """
    steps = []
    for item in passes:
        if not program.at_least(item.needs):
            raise InvariantError(
                f"{item.name} needs the stage {item.needs}, the program is {program.stage}",
                ran=program.history[-1] if program.history else "capture",
                before=program.history[:-1],
                do="put the passes in the order of qpcompile/pass_list.py",
            )
        before = operator_counts(program)
        try:
            modified = item.run(program)
        except Exception as error:
            error.add_note(f"in the pass {item.name}, after {', '.join(program.history) or 'capture'}")
            raise
        trim()
        program.history.append(item.name)
        program.stage = max(program.stage, item.gives, key=STAGES.index)
        verify(program)
        steps.append(Step(item.name, modified, before, operator_counts(program)))
        if after is not None:
            after(steps[-1], program)
    return steps


def operator_counts(program: Program) -> dict[str, dict[str, int]]:
    """The number of occurrences of each operator in each graph."""
    return {
        name: dict(sorted(Counter(_label(node.target) for node in graph.nodes if node.op == "call_function").items()))
        for name, graph in program.graphs.items()
    }


def _label(target: object) -> str:
    return target.name() if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
