"""Pass manager: the pass protocol, and running a list of passes (check the stage, run, verify, record)."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from qpcompile.errors import InvariantError, QPCompileError
from qpcompile.ir.heap import trim
from qpcompile.ir.measurements import Measurement
from qpcompile.ir.overloads import is_overload
from qpcompile.ir.program import Program
from qpcompile.ir.verify import verify
from qpcompile.stages import Stage, span, within

# What a pass raises on a graph that it does not know; errors of the system pass as they are.
DEFECTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    `name` is that of its file; `purpose` one sentence for the report. The pass runs at a stage from `needs` to `gives`,
    and afterwards the program is at `gives`. `run` edits it in place and returns whether it changed anything.
    """

    name: ClassVar[str]
    purpose: ClassVar[str]
    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    def run(self, program: Program) -> bool: ...


@dataclass(frozen=True)
class PassRun:
    """The record of one pass run: operator counts per graph before and after, and whether it changed anything."""

    name: str
    modified: bool
    before: dict[str, dict[str, int]]
    after: dict[str, dict[str, int]]


PASS_RUNS: Measurement[list[PassRun]] = Measurement("pass runs")


def run_passes(
    program: Program, passes: Sequence[Pass], after: Callable[[PassRun, Program], None] | None = None
) -> list[PassRun]:
    """Run passes in order, and verify the program after every one of them.

    Raises InvariantError if a pass cannot run at the program's stage, or breaks the rules of its own.
    """
    steps: list[PassRun] = []
    for item in passes:
        if not within(program.stage, item.needs, item.gives):
            raise InvariantError(
                f"{item.name} runs at {span(item.needs, item.gives)}, the program is {program.stage}",
                ran=program.history[-1] if program.history else "capture",
                before=program.history[:-1],
                do="put the passes in the order of qpcompile/pass_list.py",
            )
        before = operator_counts(program)
        with defects(program, item.name):
            modified = item.run(program)
        trim()
        program.history.append(item.name)
        program.stage = item.gives
        verify(program)
        steps.append(PassRun(item.name, modified, before, operator_counts(program)))
        if after is not None:
            after(steps[-1], program)
    return steps


@contextmanager
def defects(program: Program, step: str) -> Generator[None]:
    """Exceptions of Python and torch inside become an InvariantError: the step, graph and node, and the line.

    Errors of ours are noted with the step; those of the system, and too little memory, pass as they are.
    """
    try:
        yield
    except QPCompileError as error:
        error.add_note(f"in the pass {step}, after {', '.join(program.history) or 'capture'}")
        raise
    except torch.OutOfMemoryError:
        raise
    except DEFECTS as error:
        raise _defect(program, step, error) from error


def _defect(program: Program, step: str, error: Exception) -> InvariantError:
    line = traceback.extract_tb(error.__traceback__)[-1]
    notes = [*getattr(error, "__notes__", ())]
    return InvariantError(
        f"{step} failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
        where="; ".join([*notes, f"{Path(line.filename).name}:{line.lineno}"]),
        ran=step,
        before=program.history,
        do="report this with the model family and the recipe: a pass met a graph that it does not know",
    )


def operator_counts(program: Program) -> dict[str, dict[str, int]]:
    """The number of occurrences of each operator in each graph."""
    return {
        name: dict(sorted(Counter(_label(node.target) for node in graph.nodes if node.op == "call_function").items()))
        for name, graph in program.graphs.items()
    }


def _label(target: object) -> str:
    return target.name() if is_overload(target) else getattr(target, "__name__", str(target))
