"""The command `qpcompile eval` with recipes or an output folder: rows, their retention, one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qpcompile.errors import CalibrationError
from qpcompile.evaluate.run.bootstrap import retention
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, InProcess, Outcome, RowRunner, all_rows
from qpcompile.evaluate.run.rows import FULL_PRECISION, Row
from qpcompile.recipe.recipe import Recipe

HEADS = ("row", "seed", "numerics", "%", "% of full precision", "tokens", "FLOPs %", "MB", "KV kB")
HEADS_MEAN = """tokens: visual tokens, mean over decoder layers; FLOPs: of those with all tokens in every layer;
MB: all weights; KV: the cache of one answer"""


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed for calibration samples, and for random tokens."""
    return recipe.with_overrides([f"calibration.seed={seed}", f"tokens.seed={seed}"])


def recipe_rows(
    examiner: Examiner,
    recipes: Sequence[str],
    overrides: Iterable[str],
    seeds: Sequence[int],
    runner: RowRunner | None = None,
) -> list[Row]:
    """Full precision, then every recipe with every seed; no seed: the recipe's own. A refused recipe is raised.

    runner: where rows are computed; by default here.
    """
    overrides = list(overrides)
    if len(seeds) > 1 and examiner.calibration is None:
        raise CalibrationError(
            "several seeds draw from a calibration folder, and none is named", where="--seed", do="add --calibration"
        )
    asked = [(name, Recipe.load(name).with_overrides(overrides)) for name in recipes]
    asks = [Ask(examiner, FULL_PRECISION, None)]
    words = ", ".join(overrides)
    for seed in seeds or (None,):
        for name, recipe in asked:
            asks.append(Ask(examiner, f"{name} {words}".strip(), recipe if seed is None else seeded(recipe, seed)))
    found = all_rows(asks, runner or InProcess(), _raise_refusal)
    return [row for row in found if isinstance(row, Row)]


def _raise_refusal(_: Ask, outcome: Outcome) -> None:
    if not isinstance(outcome, Row):
        raise outcome


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line per row under HEADS; with retention if there is a full-precision row of the same questions."""
    full = next((row for row in rows if row.recipe is None), None)
    return [_cells(row, full) for row in rows]


def named(row: Row) -> str:
    """A row's name, with its seed."""
    return row.name if row.seed is None else f"{row.name}, seed {row.seed}"


def _cells(row: Row, full: Row | None) -> tuple[str, ...]:
    kept = "-"
    if full is not None and full.correct and row.recipe is not None:
        found = retention(row.marks, full.marks)
        kept = f"{100 * found.estimate:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"
    return (
        row.name,
        "-" if row.seed is None else str(row.seed),
        "-" if row.recipe is None else str(row.recipe.get("numerics", "-")),
        f"{100 * row.accuracy:.2f}",
        kept,
        f"{row.mean_visual_tokens:.1f}",
        f"{100 * row.flops_share:.1f}",
        f"{row.weight_bytes / 1e6:.2f}",
        f"{row.kv_bytes / 1e3:.1f}",
    )
