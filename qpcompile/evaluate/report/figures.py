"""The figures of a sweep: retention against mean tokens, ablations as bars, and layer profiles.

Figures of "QUOTA" (arXiv 2604.17320) that they reproduce on other models: 2 and 3 (concentration and redundancy per
layer), 4 (stage-wise against joint, an ablation here).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qpcompile.evaluate.report.groups import Group, ablation, factorial, full_precision
from qpcompile.evaluate.run.bootstrap import Interval, difference, retention
from qpcompile.evaluate.run.rows import Row
from qpcompile.evaluate.sweep.plan import BASE

# Eight colour-blind-safe colours (Okabe and Ito), repeated with other markers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f")
MARKERS = ("o", "s", "^", "D", "v")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "qpcompile",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
GREY = "#777777"


def retention_figure(found: Sequence[Group], bed: str, quantizer: str) -> Figure | None:
    """Retention against mean visual tokens, a line per pruner; None if nothing was pruned."""
    full = full_precision(found, bed)
    chosen = [group for group in factorial(found, bed, quantizer) if group.rows]
    pruned = [group for group in chosen if group.mean("mean_visual_tokens") < full.mean("visual_tokens")]
    if not pruned:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, pruner in enumerate(dict.fromkeys(group.key.pruner for group in pruned)):
            points = sorted(
                (group.mean("mean_visual_tokens"), retention(group.marks, full.marks))
                for group in pruned
                if group.key.pruner == pruner
            )
            look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number // len(COLORS) % len(MARKERS)]}
            _line(axes, points, pruner, look)
        for group in chosen:
            if group not in pruned:
                level = 100 * retention(group.marks, full.marks).estimate
                axes.axhline(level, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
                axes.annotate(f"all tokens {level:.1f}", (1, level), (-2, 3), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", fontsize=8, color=GREY)  # fmt: skip
        axes.set_xlabel(f"visual tokens, mean over decoder layers (of {full.mean('visual_tokens'):.0f})")
        axes.set_ylabel("accuracy, % of full precision")
        axes.set_title(f"{bed}, {quantizer} (bars: 95 % intervals over questions)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def ablation_figure(found: Sequence[Group], bed: str, name: str) -> Figure | None:
    """Accuracy gain of each variant over the unchanged recipe, in points; None if the recipe was not computed."""
    chosen = [group for group in ablation(found, bed, name) if group.rows]
    base = next((group for group in chosen if group.key.variant == BASE), None)
    if base is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + 0.36 * len(chosen)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=GREY, linewidth=1)
        for place, group in enumerate(chosen):
            _dot(axes, place, difference(group.marks, base.marks), COLORS[1] if place else COLORS[0])
        labels = [f"{group.key.variant} ({100 * group.accuracy:.1f} %)" for group in chosen]
        axes.set_yticks(range(len(chosen)), labels)
        axes.set_ylim(len(chosen) - 0.5, -0.6)
        axes.set_xlabel(f"points of accuracy over {BASE} (bars: 95 % intervals over questions)")
        axes.set_title(f"{bed}: {name}")
    return figure


@dataclass(frozen=True)
class Profile:
    """Calibration measurements of each layer under one quantizer."""

    name: str
    layers: list[int]
    mass: list[float]
    spread: list[float]
    cosine: list[float]
    candidates: list[int]


def profiles(found: Sequence[Group], bed: str) -> list[Profile]:
    """One profile per quantizer: of the first profiled row, preferring rows with candidate layers."""
    rows = [(group.key.quantizer, row) for group in found if group.key.bed == bed for row in group.rows]
    first: dict[str, Row] = {}
    for name, row in sorted(rows, key=lambda pair: not pair[1].plan.get("candidate_layers")):
        if row.plan.get("facts"):
            first.setdefault(name, row)
    return [_profile(name, first[name]) for name in dict.fromkeys(name for name, _ in rows) if name in first]


def _profile(name: str, row: Row) -> Profile:
    facts = row.plan["facts"]
    layers, mass, spread, cosine = (
        [fact[key] for fact in facts] for key in ("layer", "mass_median", "mass_iqr", "cosine")
    )
    return Profile(name, layers, mass, spread, cosine, row.plan["candidate_layers"])


def profile_figure(bed: str, measured: Sequence[Profile]) -> Figure | None:
    """Concentration and redundancy per layer, the candidate layers of the last profile shaded."""
    if not measured:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        mass, cosine = figure.subplots(2, 1, sharex=True)
        for axes in (mass, cosine):
            for layer in measured[-1].candidates:
                axes.axvspan(layer - 0.5, layer + 0.5, color="#e8eef7", linewidth=0, zorder=0)
        for number, profile in enumerate(measured):
            color, half = COLORS[number % len(COLORS)], np.array(profile.spread) / 2
            middle = np.array(profile.mass)
            mass.plot(profile.layers, middle, color=color, marker="o", markersize=4, label=profile.name)
            mass.fill_between(profile.layers, middle - half, middle + half, color=color, alpha=0.18, linewidth=0)
            cosine.plot(profile.layers, profile.cosine, color=color, marker="o", markersize=4)
        mass.set_title(f"{bed}: attention mass on the ten most attended visual tokens (band: interquartile range)")
        cosine.set_title("median cosine between visual tokens")
        cosine.set_xlabel("decoder layer (shaded: candidates for a cut)")
        cosine.set_xticks(measured[0].layers)
        mass.legend()
    return figure


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg"."""
    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(target, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return target.getvalue()


def _line(axes: Axes, points: Sequence[tuple[float, Interval]], label: str, look: dict[str, Any]) -> None:
    x = [tokens for tokens, _ in points]
    middle = np.array([100 * kept.estimate for _, kept in points])
    low = middle - [100 * kept.low for _, kept in points]
    high = np.array([100 * kept.high for _, kept in points]) - middle
    axes.errorbar(x, middle, yerr=[low, high], label=label, linewidth=1.4, markersize=4.5, elinewidth=0.8, **look)


def _dot(axes: Axes, place: int, found: Interval, color: str) -> None:
    middle = 100 * found.estimate
    bars = [[middle - 100 * found.low], [100 * found.high - middle]]
    axes.errorbar([middle], [place], xerr=bars, color=color, marker="o", capsize=3)
    axes.annotate(f"{middle:+.1f}", (middle, place), (0, 5), textcoords="offset points", ha="center", fontsize=8)
