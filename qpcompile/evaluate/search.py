"""The recipe with the fewest tokens and bits that keeps a share of full precision's accuracy.

One recipe, two coordinates: bits from the LADDER, and the mean share of visual tokens from SHARES. For each rung the
smallest sufficient share is found by bisection, assuming that accuracy is monotonic in the number of tokens. Of these
the cheapest is selected, in bit operations relative to full precision with all tokens:

    cost = FLOPs share x bits of weights / 16 x bits of activations / 16        (ties: fewer bytes of cache)

The questions used here are a selection set: report a recipe's accuracy on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from qpcompile.errors import OutputError, PlanError, QPCompileError
from qpcompile.evaluate.report.figures import COLORS, GREY, STYLE, figure_bytes
from qpcompile.evaluate.run.bootstrap import Interval, retention
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, InProcess, RowRunner, Walk, all_rows, stored
from qpcompile.evaluate.run.rows import FULL_PRECISION, Row
from qpcompile.files import replace_file
from qpcompile.recipe.recipe import Recipe

SHARES = (0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LADDER: dict[str, tuple[str, ...]] = {
    "W4A4KV4": (),
    "W4A4KV16": ("quantize.kv_cache.bits=16",),
    "W4A16KV4": ("quantize.activations.bits=16",),
    "W4A16KV16": ("quantize.activations.bits=16", "quantize.kv_cache.bits=16"),
    "16 bit": ("quantize=null",),
}


@dataclass(frozen=True)
class Trial:
    """One evaluated recipe."""

    bits: str
    share: float
    recipe: Recipe
    row: Row
    kept: Interval

    @property
    def cost(self) -> tuple[float, float]:
        """Relative bit operations, then bytes of the cache."""
        scheme = self.recipe.quantize
        weights, activations = (16.0, 16.0)
        if scheme is not None:
            weights = scheme.mean_bits.weights or scheme.weights.bits
            activations = scheme.mean_bits.activations or scheme.activations.bits
        return self.row.flops_share * weights * activations / 256, self.row.kv_bytes


@dataclass(frozen=True)
class Found:
    """All trials, and the cheapest sufficient one."""

    trials: tuple[Trial, ...]
    best: Trial
    accuracy: float


def search(
    examiner: Examiner,
    recipe: Recipe,
    accuracy: float,
    say: Callable[[str], None],
    runner: RowRunner | None = None,
) -> Found:
    """Find the cheapest recipe whose retention is at least `accuracy`; PlanError if there is none.

    Args:
        examiner: model, questions and calibration data.
        recipe: the source of the method and all other settings; it quantizes to 4 bits and drops tokens.
        accuracy: share of full precision's accuracy to keep, e.g. 0.97.
        say: called with a line per trial.
        runner: where rows are computed, by default here; rungs of the ladder are independent of each other.
    """
    if recipe.quantize is None or recipe.tokens.method == "none":
        raise PlanError(
            "there is nothing to search: the recipe must quantize and drop tokens",
            where="recipe",
            do="start from one that does both, such as quota-30",
        )
    scheme = recipe.quantize
    if (scheme.weights.bits, scheme.activations.bits, scheme.kv_cache.bits) != (4, 4, 4):
        raise PlanError(
            "the search begins with 4-bit weights, activations and cache, and the recipe has others",
            where="recipe",
            do="start from one that has them, such as quota-30",
        )
    runner = runner or InProcess()
    (full,) = all_rows([Ask(examiner, FULL_PRECISION, None)], runner)
    if not isinstance(full, Row):
        raise full
    rungs = runner.run([_smallest_share(examiner, recipe, bits, full, accuracy, say) for bits in LADDER])
    trials = [trial for rung in rungs for trial in rung]
    good = [trial for trial in trials if trial.kept.estimate >= accuracy]
    if not good:
        top = max(trials, key=lambda trial: trial.kept.estimate)
        raise PlanError(
            f"no recipe keeps {100 * accuracy:g} % of full precision's accuracy; the best keeps "
            f"{100 * top.kept.estimate:.1f} % with {top.bits} and {top.share:g} of the tokens",
            where=f"{len(trials)} trials",
            do="ask for less accuracy, or try another method in the recipe",
        )
    return Found(tuple(trials), min(good, key=lambda trial: trial.cost), accuracy)


def _smallest_share(
    examiner: Examiner, recipe: Recipe, bits: str, full: Row, accuracy: float, say: Callable[[str], None]
) -> Walk[list[Trial]]:
    """All trials of a bisection over SHARES, starting with all tokens: if those are insufficient, every share is."""
    tried: list[Trial] = []

    def enough(place: int) -> Walk[bool]:
        share = SHARES[place]
        try:
            asked = recipe.with_overrides([*LADDER[bits], *_budget(share)])
            row = yield from stored(Ask(examiner, f"{bits} at {share:g}", asked))
            if not isinstance(row, Row):
                raise row
        except OutputError:
            raise  # a full disk is not a property of the recipe
        except QPCompileError as error:
            say(f"{bits}, {share:g} of the tokens: not possible: {error.what}")
            return False
        trial = Trial(bits, share, asked, row, retention(row.marks, full.marks))
        tried.append(trial)
        say(f"{bits}, {trial.share:g} of the tokens: {100 * trial.kept.estimate:.1f} %, cost {trial.cost[0]:.4f}")
        return trial.kept.estimate >= accuracy

    low, high = -1, len(SHARES) - 1
    if not (yield from enough(high)):
        return tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (yield from enough(middle)) else (middle, high)
    return tried


def _budget(share: float) -> list[str]:
    return [f"tokens.keep={share:g}", "tokens.keep_of=mean"] if share < 1 else ["tokens.method=none", "tokens.keep=1"]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front: trials not dominated in cost and retention, cheapest first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.cost, -trial.kept.estimate)):
        if not best or trial.kept.estimate > best[-1].kept.estimate:
            best.append(trial)
    return best


def write_search(found: Found, out: Path) -> None:
    """Write recipe.yaml, search.md and pareto.png/.svg into `out`."""
    replace_file(out / "recipe.yaml", found.best.recipe.to_yaml().encode())
    replace_file(out / "search.md", table(found).encode())
    figure = pareto_figure(found)
    for kind in ("png", "svg"):
        replace_file(out / f"pareto.{kind}", figure_bytes(figure, kind))


def table(found: Found) -> str:
    """All trials as Markdown, cheapest first."""
    heads = ("bits", "share of tokens", "mean tokens", "kept of full precision, %", "cost", "KV bytes", "")
    on_front = front(found.trials)
    rows = [
        (
            trial.bits,
            f"{trial.share:g}",
            f"{trial.row.mean_visual_tokens:.1f}",
            f"{100 * trial.kept.estimate:.1f} [{100 * trial.kept.low:.1f}, {100 * trial.kept.high:.1f}]",
            f"{trial.cost[0]:.4f}",
            f"{trial.row.kv_bytes:,.0f}",
            "chosen" if trial is found.best else "front" if trial in on_front else "",
        )
        for trial in sorted(found.trials, key=lambda trial: trial.cost)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)]
    return "\n".join([f"# Recipes that keep {100 * found.accuracy:g} %\n", *lines, "", "![front](pareto.png)", ""])


def pareto_figure(found: Found) -> Figure:
    """Retention against cost, one colour per rung of the ladder, the front as a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for number, bits in enumerate(LADDER):
            chosen = [trial for trial in found.trials if trial.bits == bits]
            axes.plot(
                [trial.cost[0] for trial in chosen],
                [100 * trial.kept.estimate for trial in chosen],
                linestyle="none", marker="o", markersize=5, color=COLORS[number], label=bits,
            )  # fmt: skip
        best = front(found.trials)
        axes.plot([t.cost[0] for t in best], [100 * t.kept.estimate for t in best], color=GREY, linewidth=1, zorder=0)
        axes.axhline(100 * found.accuracy, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        x, y = found.best.cost[0], 100 * found.best.kept.estimate
        label = f"{found.best.bits}, {found.best.row.mean_visual_tokens:.0f} tokens"
        axes.annotate(label, (x, y), (8, -14), textcoords="offset points", fontsize=8)
        axes.scatter([x], [y], s=90, facecolors="none", edgecolors="black", zorder=3)
        axes.set_xscale("log")
        axes.set_xlabel("cost: bit operations, relative to 16 bit with all tokens")
        axes.set_ylabel("accuracy, % of full precision")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
