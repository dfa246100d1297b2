"""Where rows are computed, and the one place that stores them.

A walk is a generator that asks for one row after another; different walks are independent. A runner advances walks: in
this process (InProcess), or on Ray (ray_rows.py). Walks run in the process that started them, so whatever computes the
rows, one process writes them, and results have the order of the walks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from qpcompile.errors import OutputError, QPCompileError
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.rows import Row
from qpcompile.recipe.recipe import Recipe

T = TypeVar("T")
Outcome = Row | QPCompileError
"""A row, or why the recipe was refused."""


@dataclass(frozen=True)
class Ask:
    """A row to compute. recipe None: full precision."""

    examiner: Examiner
    name: str
    recipe: Recipe | None

    @cached_property
    def id(self) -> str:
        """The id of the row."""
        return self.examiner.id(self.recipe)


Walk = Generator[Ask, Outcome, T]


class RowRunner(Protocol):
    """Advances walks until all have ended."""

    def run(self, walks: Iterable[Walk[T]]) -> list[T]:
        """The results of the walks, in their order. An exception of a walk, and an OutputError, end all of them."""
        ...


class InProcess:
    """One walk after the other, in this process: rows share what their examiner has measured."""

    def run(self, walks: Iterable[Walk[T]]) -> list[T]:
        """See RowRunner."""
        return [_finished(walk) for walk in walks]


def _finished(walk: Walk[T]) -> T:
    outcome = None
    while True:
        try:
            ask = next(walk) if outcome is None else walk.send(outcome)
        except StopIteration as end:
            return end.value
        outcome = computed(ask.examiner, ask.name, ask.recipe)


def computed(examiner: Examiner, name: str, recipe: Recipe | None) -> Outcome:
    """Compute a row. An OutputError is raised: a full disk is not a property of the recipe."""
    try:
        return examiner.compute(name, recipe)
    except OutputError:
        raise
    except QPCompileError as error:
        return error


def stored(ask: Ask) -> Walk[Outcome]:
    """Part of a walk: the stored row, or one that is computed and stored now."""
    found = ask.examiner.known(ask.recipe)
    if found is not None:
        return found.model_copy(update={"name": ask.name})
    outcome = yield ask
    if isinstance(outcome, Row) and ask.examiner.kept is not None:
        ask.examiner.kept.add(outcome)
    return outcome


def all_rows(
    asks: Sequence[Ask], runner: RowRunner, told: Callable[[Ask, Outcome], None] = lambda ask, outcome: None
) -> list[Outcome]:
    """The rows in the order asked, stored ones included. Asks with equal ids share a row.

    told: called with each row when it is computed, in the order in which that happens.
    """
    ids = [ask.id for ask in asks]
    first: dict[str, Ask] = {}
    for id, ask in zip(ids, asks, strict=True):
        first.setdefault(id, ask)

    def walk(ask: Ask) -> Walk[Outcome]:
        is_new = ask.examiner.known(ask.recipe) is None
        outcome = yield from stored(ask)
        if is_new:
            told(ask, outcome)
        return outcome

    found = dict(zip(first, runner.run([walk(ask) for ask in first.values()]), strict=True))
    return [_named(found[id], ask.name) for id, ask in zip(ids, asks, strict=True)]


def _named(outcome: Outcome, name: str) -> Outcome:
    return outcome.model_copy(update={"name": name}) if isinstance(outcome, Row) else outcome
