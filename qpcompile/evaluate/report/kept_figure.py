"""Kept visual tokens in full precision and in low bits: pictures, and the agreement of the sets.

Reproduces Figure 5 of "QUOTA" (arXiv 2604.17320), with the intersection over union of two sets of kept tokens; a random
selection of a share r of all tokens has about r / (2 - r).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qpcompile.capture.data_folder import Question
from qpcompile.evaluate.report.figures import STYLE
from qpcompile.evaluate.report.groups import Group, factorial
from qpcompile.evaluate.run.rows import Row
from qpcompile.picture import read_picture

PICTURES = 3


def agreement(first: Row, second: Row) -> float | None:
    """Mean intersection over union of the tokens kept after the last cuts of two rows; None if either drops nothing."""
    pairs = [(_last(one), _last(two)) for one, two in zip(first.kept, second.kept, strict=False)]
    shares = [len(one & two) / len(one | two) for one, two in pairs if one and two]
    return float(np.mean(shares)) if shares else None


def agreements(found: Sequence[Group], bed: str, quantizers: Sequence[str]) -> list[dict[str, str | float]]:
    """One line per pruner and share: agreement of kept tokens between the first and the last quantizer."""
    first, last = (_by_place(factorial(found, bed, name)) for name in (quantizers[0], quantizers[-1]))
    lines: list[dict[str, str | float]] = []
    for place in first:
        shared = agreement(first[place], last[place]) if place in last else None
        if shared is not None:
            lines.append({"pruner": place[0], "share": place[1], "agreement": shared})
    return lines


def kept_figure(
    found: Sequence[Group],
    bed: str,
    quantizers: Sequence[str],
    pruner: str,
    share: float,
    questions: Sequence[Question],
) -> Figure | None:
    """A row of pictures per quantizer, dropped tokens darkened; None if nothing is dropped or there is no grid.

    questions: the first that have a picture.
    """
    rows = {name: _by_place(factorial(found, bed, name)).get((pruner, share)) for name in quantizers}
    drawn = {name: row for name, row in rows.items() if row is not None and any(row.kept)}
    if not drawn:
        return None
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.5 * PICTURES, 2.75 * len(drawn)), layout="constrained")
        table = figure.subplots(len(drawn), PICTURES, squeeze=False)
        for line, (name, row) in zip(table, drawn.items(), strict=True):
            for axes, question, kept in zip(line, questions, row.kept, strict=False):
                _draw(axes, question, _last(kept), round(row.visual_tokens))
            line[0].set_ylabel(name)
        figure.suptitle(f"{bed}: what {pruner} keeps at {share:g}", x=0.01, ha="left", fontsize=10)
    return figure


def token_grid(width: int, height: int, count: int) -> tuple[int, int] | None:
    """(rows, columns) of `count` tokens in the picture's aspect ratio; None if they fill no such grid."""
    for columns in range(1, count + 1):
        rows = count // columns
        if rows * columns == count and abs(rows * width - columns * height) < 0.51 * max(width, height):
            return rows, columns
    return None


def _by_place(found: Iterable[Group]) -> dict[tuple[str, float], Row]:
    """(pruner, share) -> the row of the first seed."""
    return {(group.key.pruner, group.key.share): group.rows[0] for group in found if group.rows}


def _last(kept: dict[str, list[int]]) -> set[int]:
    """Raster indices after the last cut."""
    return set(kept[max(kept, key=int)]) if kept else set()


def _draw(axes: Axes, question: Question, kept: set[int], count: int) -> None:
    picture = read_picture(question.picture, where=question.where)
    grid = token_grid(*picture.size, count)
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(question.question, fontsize=8)
    if grid is not None:
        dark = np.array([index not in kept for index in range(count)], dtype=float).reshape(grid)
        layer = np.zeros((*grid, 4))
        layer[..., 3] = 0.8 * dark
        axes.imshow(layer, extent=(-0.5, picture.width - 0.5, picture.height - 0.5, -0.5), interpolation="nearest")
