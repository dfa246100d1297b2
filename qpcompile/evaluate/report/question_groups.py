"""Accuracy by group of questions, such as ScienceQA's subjects, contexts and grades: a column per group, then one of
all questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpcompile.evaluate.report.groups import Group
from qpcompile.evaluate.run.rows import GroupScore

Scores = Mapping[str, GroupScore]
ALL = "avg"
COUNTED = "questions"


def heads(scores: Scores) -> tuple[str, ...]:
    """The names of the columns."""
    return (*scores, ALL)


def counts(scores: Scores, questions: int) -> tuple[str, ...]:
    """Questions in each column."""
    return tuple(str(number) for number in (*(score.questions for score in scores.values()), questions))


def percents(scores: Sequence[Scores], accuracies: Sequence[float]) -> tuple[str, ...]:
    """Accuracy of each column in %, mean over rows (seeds) of the same questions."""
    columns = [[each[name].accuracy for each in scores] for name in scores[0]]
    return tuple(f"{100 * np.mean(column):.2f}" for column in (*columns, accuracies))


def group_table(title: str, found: Sequence[Group]) -> str:
    """The table of one bed's rows as Markdown, a line per group of seeds; empty if its questions have no groups."""
    done = [group for group in found if group.rows]
    first = done[0].rows[0] if done else None
    if first is None or not first.groups:
        return ""
    lines = [
        ("quantizer", "pruner", "share", "variant", *map(_in_line, heads(first.groups))),
        ("---",) * (5 + len(first.groups)),
        (COUNTED, "", "", "", *counts(first.groups, first.questions)),
    ]
    for group in done:
        key = group.key
        place = (key.quantizer or "full precision", key.pruner, f"{key.share:g}", key.variant or "")
        lines.append((*place, *percents([row.groups for row in group.rows], [row.accuracy for row in group.rows])))
    return "\n".join([f"## {title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])


def _in_line(name: str) -> str:
    """A name from a data folder as it may stand in a cell of Markdown."""
    return " ".join(name.split()).replace("|", "\\|")
